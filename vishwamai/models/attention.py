"""Grouped-query self-attention with q/k norm, rotary positions and an optional cache."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import Mask, attention
from vishwamai.models.config import TextConfig
from vishwamai.models.layers import Linear, RMSNorm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens. In a decoder's cache every array has a leading layer axis, `length` aside."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]
    segment_ids: Int[Array, "B S"]  # 0 = empty or padding
    length: Int[Array, ""]  # slots written so far, the same for all rows (prompts are padded on the left)


def rotary(positions: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin, each float32 B T 1 H/2 (Su et al. 2021)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], angles: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Turns the pairs (i, i + H/2) of each head, the layout of Llama-style checkpoints."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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
        self, x: Float[Array, "B T D"], angles: tuple[Array, Array], mask: Mask, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """`cache` must hold room for T more slots; `mask` then speaks of all its slots (q_offset = cache.length)."""
        split = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).reshape(split)), angles)
        k = rotate(self.k_norm(self.k_proj(x).reshape(split)), angles)
        v = self.v_proj(x).reshape(split)
        if cache is not None:
            start = (0, cache.length, 0, 0)
            k = jax.lax.dynamic_update_slice(cache.keys, k.astype(cache.keys.dtype), start)
            v = jax.lax.dynamic_update_slice(cache.values, v.astype(cache.values.dtype), start)
            cache = dataclasses.replace(cache, keys=k, values=v)
        out = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache
