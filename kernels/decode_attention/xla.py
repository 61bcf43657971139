"""Decoding in plain XLA operations, for every platform: all logits of the few queries at once, keys never repeated."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.mask import Mask, visible
from kernels.decode_attention.quantized import QuantizedVectors
from kernels.precision import precision


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedVectors,
    v: Float[Array, "B K S V"] | QuantizedVectors,
    mask: Mask,
    scale: float,
    logit_softcap: float | None,
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B T N V"]:
    """As `reference.decode_attention`. A vector's scale is put on its logit, or on its weight."""
    (k, k_scales), (v, v_scales) = (x if isinstance(x, QuantizedVectors) else (x, None) for x in (k, v))
    stats = jnp.promote_types(q.dtype, jnp.float32)
    (batch, num_queries, num_heads, _), num_kv_heads = q.shape, k.shape[1]
    rows = q.reshape(batch, num_queries, num_kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, num_kv_heads, -1, q.shape[-1])  # G · T of them, of one head after the other
    seen = visible(mask, 0, num_queries, 0, k.shape[2])
    if seen is not None:
        seen = jnp.broadcast_to(seen, (seen.shape[0], num_queries, seen.shape[2]))
        seen_by_any = jnp.any(seen, axis=1)[:, None]

    product = functools.partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=stats)
    logits = product("bkrh,bksh->bkrs", rows, k.astype(q.dtype)) * scale
    if k_scales is not None:
        logits = logits * k_scales[:, :, None]
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    if seen is not None:
        seen_rows = jnp.tile(seen, (1, num_heads // num_kv_heads, 1))[:, None]
        logits = jnp.where(seen_rows, logits, float(jnp.finfo(stats).min) / 2)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sink = jnp.repeat(sinks.astype(stats).reshape(num_kv_heads, -1), num_queries, axis=1)[:, :, None]
        top = jnp.maximum(top, sink)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - top)
    if seen is not None:  # 0 · NaN is NaN
        v = jnp.where(seen_by_any[..., None], v, 0)
        v_scales = None if v_scales is None else jnp.where(seen_by_any, v_scales, 0)
    if v_scales is not None:
        weights = weights * v_scales[:, :, None]
    out = product("bkrs,bksh->bkrh", weights.astype(q.dtype), v.astype(q.dtype)) / total
    if seen is not None:
        out = jnp.where(jnp.any(seen_rows, axis=-1, keepdims=True), out, 0)
    out = out.reshape(batch, num_kv_heads, -1, num_queries, v.shape[-1]).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, num_queries, num_heads, -1)
