"""Grouped-query self-attention with q/k norm, rotary positions and an optional cache."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import Mask, attention
from vishwamai.models.config import TextConfig
from vishwamai.models.layers import Linear, RMSNorm


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


def rotary(positions: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos, and sin with the sign that `rotate` wants, each float32 B T 1 H (Su et al. 2021)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    # Widened by exact products with 1 and -1, which no compiler fuses into what reads them: else XLA works out cosines
    # and sines on CPU anew for each head, layer and pass, a tenth of a small model's training step.
    half = jnp.eye(head_dim // 2, dtype=jnp.float32)
    widen = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return widen(jnp.cos(angles), jnp.hstack([half, half])), widen(jnp.sin(angles), jnp.hstack([-half, half]))


def rotate(x: Float[Array, "B T N H"], angles: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Turns the pairs (i, i + H/2) of each head, the layout of Llama-style checkpoints."""
    cos, sin = angles
    wide = x.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention of a decoder layer."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        width, init = config.hidden_size, initializers.normal(config.initializer_range)
        self.q_proj = Linear(width, heads, ("embed", "heads"), rngs=rngs, init=init)
        self.k_proj = Linear(width, kv_heads, ("embed", "kv_heads"), rngs=rngs, init=init)
        self.v_proj = Linear(width, kv_heads, ("embed", "kv_heads"), rngs=rngs, init=init)
        self.o_proj = Linear(heads, width, ("heads", "embed"), rngs=rngs, init=init)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, rngs=rngs)
        self.head_dim = config.head_dim

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
        q = rotate(self.q_norm(self.q_proj(x).reshape(split)), angles)
        k = rotate(self.k_norm(self.k_proj(x).reshape(split)), angles)
        v = self.v_proj(x).reshape(split)
        keys_values = KeysValues(k.swapaxes(1, 2), v.swapaxes(1, 2))
        if past is not None:
            slots = zip(past, keys_values, strict=True)
            keys_values = KeysValues(*(lax.dynamic_update_slice(old, new, (0, 0, length, 0)) for old, new in slots))
            k, v = (x.swapaxes(1, 2) for x in keys_values)
        out = attention(q, k, v, mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), keys_values
