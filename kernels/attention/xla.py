"""Attention in plain XLA operations: one dense block when that is small, else blocks of queries, recomputed backward."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.attention.mask import Mask, visible
from kernels.attention.reference import clear, live_rows

MAX_DENSE_LOGITS = 32 * 1024 * 1024  # up to here (128 MiB in float32) all logits exist at once
BLOCK_LOGITS = 4 * 1024 * 1024  # beyond, a block of queries has about as many


def attention(q, k, v, mask: Mask, scale, logit_softcap, sinks):
    """As `reference.attention`, in memory that grows with T + S once the logits are many."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys = k.shape[1]
    q, k, v = (clear(x, live) for x, live in zip((q, k, v), live_rows(mask, num_keys), strict=True))
    part = functools.partial(_queries, mask=mask, scale=scale, logit_softcap=logit_softcap)
    if batch * num_heads * num_queries * num_keys <= MAX_DENSE_LOGITS:
        return part(q, k, v, sinks, 0)
    block = min(num_queries, max(16, BLOCK_LOGITS // (batch * num_heads * num_keys)))
    num_blocks = -(-num_queries // block)
    # The last block is moved back to end at T: rows it shares with the block before are computed twice, kept once.
    starts = jnp.minimum(jnp.arange(num_blocks) * block, num_queries - block)

    @jax.checkpoint
    def one(start):
        return part(lax.dynamic_slice_in_dim(q, start, block, 1), k, v, sinks, start)

    out, lse = lax.map(one, starts)
    return _join(out, num_queries), _join(lse, num_queries)


def _join(blocks, length: int):
    """`L B R ...` to `B T ...`; the last block overlaps its neighbour."""
    num_blocks, _, rows = blocks.shape[:3]
    last = blocks[-1, :, num_blocks * rows - length :]
    head = jnp.moveaxis(blocks[:-1], 0, 1)
    return jnp.concatenate([head.reshape(head.shape[0], -1, *head.shape[3:]), last], axis=1)


def _queries(q: Float[Array, "B R N H"], k, v, sinks, start, *, mask: Mask, scale, logit_softcap):
    stats = jnp.promote_types(q.dtype, jnp.float32)
    batch, rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    q = q.reshape(batch, rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=stats) * scale
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    hidden = jnp.finfo(stats).min / 2
    seen = visible(mask, start, rows, 0, num_keys)
    if seen is not None:
        logits = jnp.where(seen[:, None, None], logits, hidden)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(stats).reshape(1, num_kv_heads, -1, 1, 1)
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(top)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    empty = top <= hidden
    out = jnp.einsum("bkgts,bskh->bkgth", weights.astype(v.dtype), v, preferred_element_type=stats)
    out = jnp.where(empty, 0, out / total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, rows, num_heads, -1)
    return out, lse.transpose(0, 3, 1, 2, 4).reshape(batch, rows, num_heads)
