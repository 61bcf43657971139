"""Decoding as the textbook has it, in any float type: dequantise everything, then attend with all logits at once."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention import reference
from kernels.attention.mask import Mask, visible
from kernels.decode_attention.quantized import QuantizedVectors


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedVectors,
    v: Float[Array, "B K S V"] | QuantizedVectors,
    mask: Mask,
    scale: float,
    logit_softcap: float | None,
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B T N V"]:
    """In at least float32; arguments as in `kernels.decode_attention`, all checked."""
    stats = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (x.dequantized(stats) if isinstance(x, QuantizedVectors) else x.astype(stats) for x in (k, v))
    seen = visible(mask, 0, q.shape[1], 0, k.shape[2])
    if seen is not None:
        seen = jnp.any(seen, axis=1)[:, None, :, None]
        k, v = (jnp.where(seen, x, 0) for x in (k, v))
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    return reference.attention(q.astype(stats), k, v, mask, scale, logit_softcap, sinks)[0]
