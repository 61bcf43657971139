"""Keys and values of past tokens: all of them, or of a layer with a window only those that it can still see."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import Mask
from kernels.decode_attention.quantized import QuantizedVectors, quantize


class KeysValues(NamedTuple):
    """What one layer's attention reads; heads before slots, as its products read them."""

    keys: Float[Array, "B K S H"] | QuantizedVectors
    values: Float[Array, "B K S H"] | QuantizedVectors

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self)[0].shape[2]

    def quantized(self, dtype: Any) -> "KeysValues":
        return KeysValues(*(quantize(x, dtype) for x in self))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, with free slots for those to come.

    One pair of arrays per layer, so that each is updated in place; `Transformer.prefill` makes it. They may be
    quantised; tokens that are written behind become so too, each vector by itself. A layer with a window may have fewer
    slots than there are tokens, R: token n then stands in slot n % R, until a later one takes it.
    """

    layers: tuple[KeysValues, ...]
    segment_ids: Int[Array, "B S"]  # 0 = padding; a free slot already has the segment of the token that will take it
    length: Int[Array, "..."]  # tokens written so far: of all rows (prompts are padded on the left), or of each

    def mask(self, q_segment_ids: Int[Array, "B T"]) -> Mask:
        """What the T tokens behind the cached ones see: their segment in the cache, and each other causally."""
        ids = self.segment_ids
        return Mask(causal=True, q_segment_ids=q_segment_ids, kv_segment_ids=ids, q_offset=self.length)


def filled(prompt: KeysValues, slots: int) -> KeysValues:
    """A prompt's keys and values in `slots` slots: with free ones behind, or the latest in their places of a ring."""
    length = prompt.slots

    def fill(x: Array) -> Array:
        if length <= slots:
            return jnp.pad(x, [(0, slots - length if axis == 2 else 0) for axis in range(x.ndim)])
        return jnp.roll(x[:, :, -slots:], length % slots, axis=2)

    return jax.tree.map(fill, prompt)


def extended(
    past: KeysValues, new: KeysValues, mask: Mask, window: int | None, length: Int[Array, "..."]
) -> tuple[KeysValues, KeysValues, Mask]:
    """`past` with T tokens more, and what their attention reads: keys and values, and the mask that speaks of these.

    Args:
        mask: of the T tokens over the whole text (`KVCache.mask`).
        window: of the layer; with it, a ring of R slots must hold window + T - 1 tokens, and as many more as may stand
            there behind the T, written once and taken back by a lower length; or all.
        length: how many tokens came before, of all rows or of each.
    """
    slots, count = past.slots, new.slots
    if isinstance(past.keys, QuantizedVectors):
        new = new.quantized(past.keys.values.dtype)
    if slots >= mask.kv_segment_ids.shape[1]:
        written = _written(past, new, length)
        return written, written, mask
    last = (length + count - 1)[..., None]
    if count == 1:
        written = _written(past, new, length % slots)
        # Slots may stand in any order: one query sees all that are in its window.
        token = last - (last - jnp.arange(slots)) % slots
        seen = jnp.where(token > last - window, _segments(mask, token), 0)
        return written, written, Mask(q_segment_ids=mask.q_segment_ids, kv_segment_ids=seen)
    at = jnp.broadcast_to((length[..., None] + jnp.arange(count)) % slots, (len(mask.kv_segment_ids), count))
    write = jax.vmap(lambda old, more, at: old.at[:, at].set(more))  # by row: on a mesh each device writes its own
    written = jax.tree.map(lambda old, more: write(old, more, at), past, new)
    token = last - slots + 1 + jnp.arange(slots)
    order = jnp.atleast_2d(token % slots)[:, None]
    ordered = jax.tree.map(
        lambda x: jnp.take_along_axis(x, order if x.ndim == 3 else order[..., None], axis=2), written
    )
    q_ids, ids = mask.q_segment_ids, _segments(mask, token)
    return written, ordered, Mask(causal=True, q_segment_ids=q_ids, kv_segment_ids=ids, q_offset=slots - count)


def _written(past: KeysValues, new: KeysValues, start: Int[Array, "..."]) -> KeysValues:
    """In place, from slot `start` of all rows or of each."""
    write = lax.dynamic_update_slice_in_dim
    if start.ndim == 0:
        return jax.tree.map(lambda old, more: write(old, more, start, axis=2), past, new)
    return jax.tree.map(lambda *pair: jax.vmap(partial(write, axis=1))(*pair, start), past, new)


def _segments(mask: Mask, token: Int[Array, "... R"]) -> Int[Array, "B R"]:
    """The segments of tokens by their number, of all rows or of each; 0 for what was never there."""
    token = jnp.atleast_2d(token)
    ids = jnp.take_along_axis(mask.kv_segment_ids, jnp.maximum(token, 0), axis=1)
    return jnp.where(token >= 0, ids, 0)
