"""Which experts a token goes to, and with what weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SCORINGS = ("softmax", "sigmoid")


class Routes(NamedTuple):
    """Where each of T tokens goes."""

    experts: Int[Array, "T k"]  # the most likely first
    weights: Float[Array, "T k"]  # of the experts' outputs in their sum
    counts: Int[Array, " E"]  # tokens of each expert


def scores(logits: Float[Array, "T E"], scoring: str) -> Float[Array, "T E"]:
    """float32 scores of each expert: probabilities that sum to 1 (softmax), or each for itself (sigmoid)."""
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r}: expected one of {', '.join(SCORINGS)}")
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.nn.softmax(wide, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(wide)


def route(
    logits: Float[Array, "T E"],
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalise: bool = True,
    bias: Float[Array, " E"] | None = None,
    scale: float = 1.0,
) -> Routes:
    """The `top_k` experts of each token with the highest scores.

    softmax with renormalised weights is Mixtral's and Qwen3-MoE's router (arXiv 2401.04088), sigmoid with a `bias`
    DeepSeek-V3's (arXiv 2412.19437, eq. 16): the bias takes part in the choice, not in the weights. Gradients flow
    through the weights, not through the choice.

    Args:
        renormalise: the chosen weights sum to 1.
        scale: factor of the weights.

    Raises:
        ValueError: more experts asked for than there are, an unknown scoring, or arrays that do not fit.
    """
    if logits.ndim != 2 or not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k={top_k} of logits {logits.shape}: expected T E with 1 <= top_k <= E")
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"bias has shape {bias.shape}, the logits {logits.shape}: expected one for each expert")
    found = scores(logits, scoring)
    ranked = found if bias is None else found + jax.lax.stop_gradient(bias.astype(found.dtype))
    experts = jax.lax.top_k(jax.lax.stop_gradient(ranked), top_k)[1]
    weights = jnp.take_along_axis(found, experts, axis=-1)
    if renormalise:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # Sigmoids may all be 0: such a token takes nothing from its experts.
        weights = weights / jnp.where(total == 0, 1, total)
    counts = jnp.sum(jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.int32), axis=(0, 1))
    return Routes(experts, weights * scale, counts)
