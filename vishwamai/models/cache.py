"""Keys and values of past tokens: all of them, or of a layer with a window only those that it can still see."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import Mask


class KeysValues(NamedTuple):
    """What one layer's attention reads; heads before slots, as its products read them."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]

    @property
    def slots(self) -> int:
        return self.keys.shape[2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, with free slots for those to come.

    One pair of arrays per layer, so that each is updated in place; `Transformer.prefill` makes it. A layer with a
    window may have fewer slots than there are tokens, R: token n then stands in slot n % R, until a later one takes it.
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
    if length <= slots:
        return KeysValues(*(jnp.pad(x, ((0, 0), (0, 0), (0, slots - length), (0, 0))) for x in prompt))
    return KeysValues(*(jnp.roll(x[:, :, -slots:], length % slots, axis=2) for x in prompt))


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
    pairs = list(zip(past, new, strict=True))
    if slots >= mask.kv_segment_ids.shape[1]:
        written = KeysValues(*(_written(old, more, length) for old, more in pairs))
        return written, written, mask
    last = (length + count - 1)[..., None]
    if count == 1:
        written = KeysValues(*(_written(old, more, length % slots) for old, more in pairs))
        # Slots may stand in any order: one query sees all that are in its window.
        token = last - (last - jnp.arange(slots)) % slots
        seen = jnp.where(token > last - window, _segments(mask, token), 0)
        return written, written, Mask(q_segment_ids=mask.q_segment_ids, kv_segment_ids=seen)
    rows, at = jnp.arange(new.keys.shape[0])[:, None], (length[..., None] + jnp.arange(count)) % slots
    written = KeysValues(*(old.at[rows, :, at].set(more.swapaxes(1, 2)) for old, more in pairs))
    token = last - slots + 1 + jnp.arange(slots)
    order = jnp.atleast_2d(token % slots)[:, None, :, None]
    ordered = KeysValues(*(jnp.take_along_axis(x, order, axis=2) for x in written))
    q_ids, ids = mask.q_segment_ids, _segments(mask, token)
    return written, ordered, Mask(causal=True, q_segment_ids=q_ids, kv_segment_ids=ids, q_offset=slots - count)


def _written(
    old: Float[Array, "B K S H"], more: Float[Array, "B K T H"], start: Int[Array, "..."]
) -> Float[Array, "B K S H"]:
    """In place, from slot `start` of all rows or of each."""
    if start.ndim == 0:
        return lax.dynamic_update_slice(old, more, (0, 0, start, 0))
    return jax.vmap(lambda old, more, start: lax.dynamic_update_slice(old, more, (0, start, 0)))(old, more, start)


def _segments(mask: Mask, token: Int[Array, "... R"]) -> Int[Array, "B R"]:
    """The segments of tokens by their number, of all rows or of each; 0 for what was never there."""
    token = jnp.atleast_2d(token)
    ids = jnp.take_along_axis(mask.kv_segment_ids, jnp.maximum(token, 0), axis=1)
    return jnp.where(token >= 0, ids, 0)
