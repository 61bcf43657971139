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
    length: Int[Array, ""]  # tokens written so far, the same for all rows (prompts are padded on the left)

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
    past: KeysValues, new: KeysValues, mask: Mask, window: int | None, length: Int[Array, ""]
) -> tuple[KeysValues, KeysValues, Mask]:
    """`past` with T tokens more, and what their attention reads: keys and values, and the mask that speaks of these.

    Args:
        mask: of the T tokens over the whole text (`KVCache.mask`).
        window: of the layer; with it, a ring of R slots must hold window + T - 1 tokens, or all.
        length: how many tokens came before.
    """
    slots, count = past.slots, new.slots
    if slots >= mask.kv_segment_ids.shape[1]:
        pairs = zip(past, new, strict=True)
        written = KeysValues(*(lax.dynamic_update_slice(old, more, (0, 0, length, 0)) for old, more in pairs))
        return written, written, mask
    at = (length + jnp.arange(count)) % slots
    if count == 1:  # in place
        write = lambda old, more: lax.dynamic_update_slice(old, more, (0, 0, at[0], 0))  # noqa: E731
    else:
        write = lambda old, more: old.at[:, :, at].set(more)  # noqa: E731
    written = KeysValues(*(write(old, more) for old, more in zip(past, new, strict=True)))
    last = length + count - 1
    if count == 1:
        # Slots may stand in any order: one query sees all that are in its window.
        token = last - (last - jnp.arange(slots)) % slots
        seen = jnp.where(token > last - window, _segments(mask, token), 0)
        return written, written, Mask(q_segment_ids=mask.q_segment_ids, kv_segment_ids=seen)
    token = last - slots + 1 + jnp.arange(slots)
    ordered = KeysValues(*(jnp.take(x, token % slots, axis=2) for x in written))
    ids = _segments(mask, token)
    q_ids = mask.q_segment_ids
    return written, ordered, Mask(causal=True, q_segment_ids=q_ids, kv_segment_ids=ids, q_offset=slots - count)


def _segments(mask: Mask, token: Int[Array, " R"]) -> Int[Array, "B R"]:
    """The segments of tokens by their number; 0 for what was never there."""
    ids = jnp.take(mask.kv_segment_ids, jnp.maximum(token, 0), axis=1)
    return jnp.where(token >= 0, ids, 0)
