"""Grouped-query self-attention with rotary positions, q/k norm, a window and a cache, each where there is one."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
from flax import nnx
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import Mask, attention
from vishwamai.models.config import TextConfig
from vishwamai.models.layers import Linear, RMSNorm
from vishwamai.models.rope import rotate


class KeysValues(NamedTuple):
    """What one layer's attention reads; heads before slots, as its products read them."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, with free slots for those to come.

    One pair of arrays per layer, so that each is updated in place; `Transformer.prefill` makes it.
    """

    layers: tuple[KeysValues, ...]
    segment_ids: Int[Array, "B S"]  # 0 = padding; a free slot already has the segment of the token that will take it
    length: Int[Array, ""]  # slots written so far, the same for all rows (prompts are padded on the left)

    def mask(self, q_segment_ids: Int[Array, "B T"]) -> Mask:
        """What the T tokens behind the cached ones see: their segment in the cache, and each other causally."""
        ids = self.segment_ids
        return Mask(causal=True, q_segment_ids=q_segment_ids, kv_segment_ids=ids, q_offset=self.length)


class Attention(nnx.Module):
    """Causal self-attention of a decoder layer."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        width, init = config.hidden_size, initializers.normal(config.initializer_range)
        on_inputs, on_output = config.attention_bias.of_layers
        inputs = dict(rngs=rngs, init=init, bias=on_inputs)
        self.q_proj = Linear(width, heads, ("embed", "heads"), **inputs)
        self.k_proj = Linear(width, kv_heads, ("embed", "kv_heads"), **inputs)
        self.v_proj = Linear(width, kv_heads, ("embed", "kv_heads"), **inputs)
        self.o_proj = Linear(heads, width, ("heads", "embed"), rngs=rngs, init=init, bias=on_output)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.head_dim = config.head_dim
        self.window = config.sliding_window

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array],
        mask: Mask,
        past: KeysValues | None = None,
        length: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """The output, and the keys and values that it was made from.

        With `past`, the new ones are written into it from slot `length` on, and `mask` speaks of all its slots.
        """
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).reshape(split) for project in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        keys_values = KeysValues(k.swapaxes(1, 2), v.swapaxes(1, 2))
        if past is not None:
            slots = zip(past, keys_values, strict=True)
            keys_values = KeysValues(*(lax.dynamic_update_slice(old, new, (0, 0, length, 0)) for old, new in slots))
            k, v = (x.swapaxes(1, 2) for x in keys_values)
        out = attention(q, k, v, replace(mask, window=self.window))
        return self.o_proj(out.reshape(*x.shape[:2], -1)), keys_values
