"""Rotary positions (Su et al. 2021), and the ways in which models are stretched to longer contexts."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from vishwamai.models.config import LayerType, RopeScaling, RopeType

# What `rotate` wants, of each kind of attention.
Angles = dict[LayerType, tuple[Array, Array]]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, float32 H/2, and the factor of cos and sin (1 but for YaRN).

    linear: positions divided by the factor (Chen et al. 2023). llama3: low frequencies divided by it, high ones kept,
    those between blended (Llama 3.1). yarn: likewise, by how often a pair turns in the original context, and
    attention sharpened (Peng et al. 2023).
    """
    # In float32 and in this order, as the published models were trained.
    plain = 1 / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if scaling is None:
        return plain, 1.0
    stretched = plain / np.float32(scaling.factor)
    if scaling.rope_type is RopeType.LINEAR:
        return stretched, 1.0
    context = scaling.original_max_position_embeddings
    if scaling.rope_type is RopeType.LLAMA3:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = np.float32(context) * plain / np.float32(2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
    else:
        bounds = scaling.beta_fast, scaling.beta_slow
        first, last = (_pair_that_turns(times, head_dim, theta, context) for times in bounds)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        kept = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0, 1)
    blended = (stretched * (1 - kept) + plain * kept).astype(np.float32)
    return blended, _attention_factor(scaling)


def _pair_that_turns(times: float, head_dim: int, theta: float, context: int) -> float:
    """The (fractional) pair that turns so many times in a context."""
    return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))


def _attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies cos and sin with."""
    if scaling.rope_type is not RopeType.YARN:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def sharpening(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1

    if scaling.mscale and scaling.mscale_all_dim:
        return sharpening(scaling.mscale) / sharpening(scaling.mscale_all_dim)
    return sharpening(1.0)


def rotary(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """cos, and sin with the sign that `rotate` wants, each float32 B T 1 H."""
    per_position, factor = frequencies(head_dim, theta, scaling)
    angles = positions[:, :, None, None].astype(jnp.float32) * per_position
    # Widened by exact products with 1 and -1, which no compiler fuses into what reads them: else XLA works out cosines
    # and sines on CPU anew for each head, layer and pass, a tenth of a small model's training step.
    half = jnp.eye(head_dim // 2, dtype=jnp.float32)
    widen = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    return widen(cos, jnp.hstack([half, half])), widen(sin, jnp.hstack([-half, half]))


def rotate(x: Float[Array, "B T N H"], angles: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Turns the pairs (i, i + H/2) of each head, the layout of Llama-style checkpoints."""
    cos, sin = angles
    wide = x.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)
