"""Attention as the textbook has it: every logit exists at once, in any float type. All backends are held against it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.mask import Mask, clear_padding, visible


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    scale: float,
    logit_softcap: float | None,
    sinks: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Output in q's type and log-sum-exp in at least float32; arguments as in `kernels.attention`, all checked."""
    stats = jnp.promote_types(q.dtype, jnp.float32)
    (num_queries, num_heads), (num_keys, num_kv_heads) = q.shape[1:3], k.shape[1:3]
    q, k, v = clear_padding(mask, *(x.astype(stats) for x in (q, k, v)))
    k, v = (jnp.repeat(x, num_heads // num_kv_heads, axis=2) for x in (k, v))

    logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * scale
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    seen = visible(mask, 0, num_queries, 0, num_keys)
    if seen is not None:
        logits = jnp.where(seen[:, None], logits, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(stats)[:, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, column], axis=-1)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(stats).min))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probabilities = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)[..., :num_keys]
    out = jnp.einsum("bnts,bsnh->btnh", probabilities, v, precision="highest")
    if seen is not None:  # 0 already; but a NaN that flows back into such a row must end here
        out = jnp.where(jnp.any(seen, axis=-1)[:, :, None, None], out, 0)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)[..., 0]
    return out, lse.transpose(0, 2, 1)
