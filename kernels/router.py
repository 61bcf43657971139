"""Which experts a token goes to, and with what weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SCORINGS = ("softmax", "sigmoid")


class Routes(NamedTuple):
    """Where each of T tokens goes, and sums over the live ones: parts of a batch add up."""

    experts: Int[Array, "T k"]  # the most likely first; E, which there is not, for a token that is not live
    weights: Float[Array, "T k"]  # of the experts' outputs in their sum
    counts: Int[Array, " E"]  # tokens of each expert
    probability: Float[Array, " E"]  # scores of each expert, a token's sum being 1
    z: Float[Array, ""]  # squared log-sum-exp of the logits (ST-MoE, Zoph et al. 2022, eq. 5)
    entropy: Float[Array, ""]  # of those scores, in nats


def route(
    logits: Float[Array, "T E"],
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalise: bool = True,
    bias: Float[Array, " E"] | None = None,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    live: Bool[Array, " T"] | None = None,
) -> Routes:
    """The `top_k` experts of each token with the highest scores, the first of equal ones; all in float32 at least.

    softmax with renormalised weights is Mixtral's and Qwen3-MoE's router (arXiv 2401.04088). It is also GPT-OSS's,
    which takes the softmax of the chosen logits: exp(z_i) over the sum of the chosen exp(z_j) either way. sigmoid with
    a `bias` and `groups` is DeepSeek-V3's (arXiv 2412.19437, eq. 12 to 16): the bias takes part in the choice, not in
    the weights. Gradients flow through the weights and the sums of scores, not through the choice.

    Args:
        renormalise: the chosen weights sum to 1.
        scale: factor of the weights.
        groups: of neighbouring experts, of equal size. Only experts of the `top_groups` groups can be chosen whose two
            best experts have the highest sums of biased scores.
        live: False for padding, which is sent nowhere and counts nowhere; None: every token is live.

    Raises:
        ValueError: more experts asked for than can be chosen, groups of unequal size, an unknown scoring, or arrays
            that do not fit.
    """
    if logits.ndim != 2 or not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k={top_k} of logits {logits.shape}: expected T E with 1 <= top_k <= E")
    (tokens, experts), wide = logits.shape, jnp.promote_types(logits.dtype, jnp.float32)
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r}: expected one of {', '.join(SCORINGS)}")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias has shape {bias.shape}, the logits {logits.shape}: expected one for each expert")
    if live is not None and live.shape != (tokens,):
        raise ValueError(f"live has shape {live.shape}, the logits {logits.shape}: expected one for each token")
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"top_groups={top_groups} of groups={groups} of {experts} experts: expected equal groups")
    if top_groups * experts // groups < top_k:
        raise ValueError(f"top_k={top_k} experts do not fit in top_groups={top_groups} of {experts // groups} each")
    logits = logits.astype(wide)
    if live is not None:
        logits = jnp.where(live[:, None], logits, 0)  # what stands in padding may be NaN
    scores = jax.nn.softmax(logits, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias.astype(wide))
    if groups > 1:
        ranked = _best_groups(ranked, groups, top_groups)
    chosen = jax.lax.top_k(ranked, top_k)[1]
    # A sum over all experts, not a gather: on TPUs that goes number by number, and its gradient is a scatter.
    picked = chosen[:, :, None] == jnp.arange(experts)
    weights = jnp.sum(jnp.where(picked, scores[:, None], 0), axis=-1)
    if renormalise:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # Sigmoids may all be 0: such a token takes nothing from its experts.
        weights = weights / jnp.where(total == 0, 1, total)
    if live is not None:
        chosen = jnp.where(live[:, None], chosen, experts)
    share = scores if scoring == "softmax" else scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-20)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-20)), axis=-1)
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    if live is not None:
        share, entropy, z = jnp.where(live[:, None], share, 0), jnp.where(live, entropy, 0), jnp.where(live, z, 0)
    counts = jnp.sum(chosen[:, :, None] == jnp.arange(experts), axis=(0, 1), dtype=jnp.int32)
    return Routes(chosen, weights * scale, counts, jnp.sum(share, axis=0), jnp.sum(z), jnp.sum(entropy))


def _best_groups(ranked: Float[Array, "T E"], groups: int, top_groups: int) -> Float[Array, "T E"]:
    """-inf for all experts but those of the best groups."""
    grouped = ranked.reshape(len(ranked), groups, ranked.shape[1] // groups)
    two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
    best = jax.lax.top_k(jnp.sum(two, axis=-1), top_groups)[1]
    kept = jnp.any(best[:, :, None] == jnp.arange(groups), axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(ranked.shape)
