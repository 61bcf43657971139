"""Attention by the kernels: pads, plans the visits, adds sinks, and is differentiable in both of its outputs."""

import functools

import jax
import jax.numpy as jnp

from kernels.attention.gpu.mosaic import backward_keys, backward_queries, plan, tuning
from kernels.attention.gpu.mosaic.forward import forward
from kernels.attention.gpu.mosaic.tile import LOG2_E, NEVER, Logit
from kernels.attention.mask import Mask, clear_padding


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(q, k, v, mask: Mask, scale: float, logit_softcap: float | None, sinks):
    """As `reference.attention`; memory grows with T + S."""
    return _forward(q, k, v, mask, scale, logit_softcap, sinks)[0]


def _forward(q, k, v, mask, scale, softcap, sinks):
    num_queries, num_keys = q.shape[1], k.shape[1]
    # Only v: a hidden logit is replaced, whatever it is, but 0 times NaN is NaN.
    q_rows, k_rows, v_rows = (_pad(x) for x in (q, k, clear_padding(mask, q, k, v)[2]))
    ring = tuning.forward(q_rows.shape[3], v_rows.shape[3])
    found = plan.numbers(mask, num_queries, num_keys, q_rows.shape[1], k_rows.shape[1])
    visits = plan.of_queries(found, k_rows.shape[1], ring.size)
    sinks_2 = None if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    out, lse = forward(q_rows, k_rows, v_rows, found, visits, sinks_2, logit=Logit(scale, softcap), ring=ring)
    out, lse = out[:, :num_queries, :, : v.shape[3]], lse[..., :num_queries].swapaxes(1, 2)
    live = lse > -jnp.inf  # a sink gives a row that sees no key a log-sum-exp, but no other gradient
    if sinks is not None:
        lse = jnp.logaddexp(lse, sinks.astype(jnp.float32))
    return (out, lse), (q, k, v, mask, sinks, out, lse, live)


def _backward(scale, softcap, saved, cotangents):
    q, k, v, mask, sinks, out, lse, live = saved
    d_out, d_lse = cotangents
    d_out = jnp.where(live[..., None], d_out, 0)
    d_lse = jnp.where(live, d_lse, 0) if sinks is None else d_lse
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    stats = jnp.stack([jnp.where(live, lse * LOG2_E, NEVER), delta], axis=1).transpose(0, 3, 1, 2)
    stats = jnp.pad(stats, ((0, 0),) * 3 + ((0, -stats.shape[3] % plan.BLOCK),))

    q_rows, k_rows, v_rows, d_out_rows = (_pad(x) for x in (*clear_padding(mask, q, k, v), d_out.astype(v.dtype)))
    found = plan.numbers(mask, q.shape[1], k.shape[1], q_rows.shape[1], k_rows.shape[1])
    widths, num_keys = (q_rows.shape[3], v_rows.shape[3]), k_rows.shape[1]
    arguments, logit = (q_rows, k_rows, v_rows, d_out_rows, stats, found), Logit(scale, softcap)
    ring = tuning.backward_queries(*widths)
    visits = plan.of_queries(found, num_keys, ring.size)
    d_q = backward_queries.backward(*arguments, visits, logit=logit, ring=ring)
    ring, d_keys = tuning.backward_keys(*widths), []
    visits = plan.of_keys(found, num_keys, ring.size)
    for sums in tuning.sums(*widths):
        d_keys += backward_keys.backward(*arguments, visits, logit=logit, ring=ring, sums=sums)
    d_q, d_k, d_v = (
        x[:, : like.shape[1], :, : like.shape[3]] for x, like in ((d_q, q), *zip(d_keys, (k, v), strict=True))
    )
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks.astype(jnp.float32) - lse) * delta, axis=(0, 1)).astype(sinks.dtype)
    return d_q, d_k, d_v, None, d_sinks


attention.defvjp(_forward, _backward)


def _pad(x):
    """`B T N H` with zeros behind T, up to whole blocks, and behind H, up to what the matrix instruction takes."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % plan.BLOCK), (0, 0), (0, -x.shape[3] % 16)))
