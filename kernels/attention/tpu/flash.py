"""Attention by the two kernels: pads, lays out, adds sinks, and is differentiable in both of its outputs.

Arrays `B T N H` come in and go out as everywhere; XLA lays them out for the kernels (`B N H T` for what stands still in
the matrix units or has queries in its lanes, `B K S H` for what streams through), mostly in the operations before and
after: nothing is copied for its heads, and a head dim of 72 fills no 128 lanes.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.attention.mask import Mask, clear_padding
from kernels.attention.tpu import backward, blocks, forward, tuning
from kernels.attention.tpu.tile import LOG2_E, MAX_LOGIT, NEVER, Logit, Seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(q, k, v, mask: Mask, scale: float, logit_softcap: float | None, sinks, max_logit=None):
    """As `reference.attention`; memory grows with T + S. max_logit: float32 scalar, not differentiated."""
    return _forward(q, k, v, mask, scale, logit_softcap, sinks, max_logit)[0]


def _forward(q, k, v, mask, scale, softcap, sinks, max_logit):
    num_queries, num_keys = q.shape[1], k.shape[1]
    sizes = tuning.forward(q, k, v, mask)
    live_q, live_k, live_v = clear_padding(mask, q, k, v)
    mask = _with_length(mask, num_keys, sizes.keys)
    extent = blocks.Extent(num_queries, num_keys, sizes.queries, sizes.keys)
    q_ids, k_ids = _ids(mask, sizes)
    run = functools.partial(
        forward.forward,
        blocks.plan(mask, extent),
        _numbers(mask, num_keys),
        _pad(live_q, sizes.queries).transpose(0, 2, 3, 1),
        _pad(live_k, sizes.keys).transpose(0, 2, 1, 3),
        _pad(live_v, sizes.keys).transpose(0, 2, 3, 1),
        q_ids,
        k_ids,
        None if sinks is None else sinks.astype(jnp.float32),
        seen=_seen(mask),
        logit=Logit.of(scale, softcap),
        sizes=sizes,
    )
    if max_logit is None:
        out, stats = run(bounded=False)
    else:  # XLA drops the other kernel where it knows the number
        forms = (functools.partial(run, bounded=bounded) for bounded in (True, False))
        out, stats = lax.cond(max_logit <= MAX_LOGIT, *forms)
    out = out.transpose(0, 3, 1, 2)[:, :num_queries]
    stats = stats[..., :num_queries]
    top, total = _log2(stats, Logit.of(scale, softcap), sinks)
    return (out, _rows(top + total) / LOG2_E), (q, k, v, mask, sinks, out, stats)


def _log2(stats, logit: Logit, sinks):
    """log2 of the heaviest weight, and of the sum of weights and sink relative to it, both `B N T`."""
    top, total = stats[:, :, 0] * logit.factor, jnp.log2(stats[:, :, 1])
    if sinks is not None:
        top = jnp.where(stats[:, :, 1] > 0, top, 0)
        total = jnp.logaddexp2(total, sinks.astype(jnp.float32)[:, None] * LOG2_E - top)
    return top, total


def _rows(x):
    """`B N T` to `B T N`."""
    return x.swapaxes(1, 2)


def _backward(scale, softcap, saved, cotangents):
    q, k, v, mask, sinks, out, stats = saved
    d_out, d_lse = cotangents
    num_keys = k.shape[1]
    logit = Logit.of(scale, softcap)
    live = stats[:, :, 1] > 0
    top, total = _log2(stats, logit, sinks)
    # A row that sees no key has no gradient, whatever it is told; a sink gives it a log-sum-exp.
    d_out = jnp.where(_rows(live)[..., None], d_out, 0)
    d_lse = jnp.where(_rows(live), d_lse, 0) if sinks is None else d_lse
    delta = (jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse).swapaxes(1, 2)

    sizes = tuning.backward(q, k, v, mask)
    extent = blocks.Extent(q.shape[1], num_keys, sizes.queries, sizes.keys)
    live_q, live_k, live_v = clear_padding(mask, q, k, v)
    mask = _with_length(mask, num_keys, sizes.keys)
    q_ids, k_ids = _ids(mask, sizes)
    q_columns, d_out = (_pad(x, sizes.queries).transpose(0, 2, 3, 1) for x in (live_q, d_out.astype(v.dtype)))
    stats = jnp.stack([jnp.where(live, stats[:, :, 0], 0), jnp.where(live, total, NEVER), delta], axis=2)
    stats = jnp.pad(stats, ((0, 0),) * 3 + ((0, -stats.shape[3] % sizes.queries),))
    pieces = tuning.pieces(extent, k.shape[-1] + v.shape[-1])
    count, size = len(pieces), -(-pieces[0].num_keys // sizes.keys) * sizes.keys
    k_rows, v_rows = (_split(_pad(x, count * size), count).swapaxes(2, 3) for x in (live_k, live_v))
    k_ids = None if k_ids is None else _split(_pad(k_ids.swapaxes(1, 2), count * size), count).swapaxes(2, 3)

    def part(plan, first_key, k_rows, v_rows, k_ids):
        return backward.backward(
            plan,
            _numbers(mask, num_keys) - first_key,  # all that is said of keys is relative to these
            q_columns,
            k_rows,
            k_rows.swapaxes(2, 3),
            v_rows,
            q_ids,
            k_ids,
            d_out,
            stats,
            seen=_seen(mask),
            logit=logit,
            sizes=sizes,
        )

    rest = k_rows, v_rows, k_ids
    if count == 1:
        d_q, *d_keys = part(blocks.plan(mask, extent), 0, *jax.tree.map(lambda x: x[0], rest))
        d_keys = [x[None] for x in d_keys]
    else:  # one kernel for all pieces
        plans = blocks.plans(mask, pieces)

        def add(d_q, piece):
            table, visits, *rest = piece
            of_queries, *of_keys = part(plans._replace(table=table, visits=visits), *rest)
            return d_q + of_queries, of_keys

        each = plans.table, plans.visits, np.array([piece.first_key for piece in pieces], np.int32), *rest
        d_q, d_keys = lax.scan(add, jnp.zeros(q_columns.shape, jnp.float32), each)
    d_k, d_v = (jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1) for x in d_keys)

    def finish(x, length, factor, dtype):
        return (x * factor).transpose(0, 3, 1, 2)[:, :length].astype(dtype)

    d_sinks = None
    if sinks is not None:
        share = jnp.exp2(sinks.astype(jnp.float32)[:, None] * LOG2_E - top - total)
        d_sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)
    d_q = finish(d_q, q.shape[1], scale, q.dtype)
    d_k, d_v = finish(d_k, num_keys, scale, k.dtype), finish(d_v, num_keys, 1.0, v.dtype)
    return d_q, d_k, d_v, None, d_sinks, None


attention.defvjp(_forward, _backward)


def _with_length(mask: Mask, num_keys: int, block: int) -> Mask:
    """The mask with a `kv_length` that also hides what fills the last block; None where nothing is hidden."""
    length = num_keys if mask.kv_length is None else mask.kv_length
    length = min(max(length, 0), num_keys) if isinstance(length, int) else jnp.clip(length, 0, num_keys)
    if isinstance(length, int) and length == num_keys and num_keys % block == 0:
        length = None
    return replace(mask, kv_length=length)


def _seen(mask: Mask) -> Seen:
    return Seen(
        causal=mask.causal,
        window=mask.window,
        prefix=mask.causal and mask.prefix_length is not None,
        segments=mask.q_segment_ids is not None,
        block_ids=mask.causal and mask.block_ids is not None,
        length=mask.kv_length is not None,
    )


def _numbers(mask: Mask, num_keys: int) -> jax.Array:
    """int32 `1 3` or `B 3`: q_offset, prefix_length, kv_length."""
    length = num_keys if mask.kv_length is None else mask.kv_length
    prefix = 0 if mask.prefix_length is None else mask.prefix_length
    numbers = [jnp.reshape(x, (-1, 1)) for x in (mask.q_offset, prefix, length)]
    rows = max(x.shape[0] for x in numbers)
    return jnp.concatenate([jnp.broadcast_to(x, (rows, 1)) for x in numbers], axis=1).astype(jnp.int32)


def _ids(mask: Mask, sizes):
    """int32 `B R T` of queries and `B R S` of keys: segments, then blocks, where there are any; id 0 equals nothing."""
    pairs = [(mask.q_segment_ids, mask.key_segments)] if mask.q_segment_ids is not None else []
    if mask.causal and mask.block_ids is not None:
        pairs.append((mask.block_ids, mask.block_ids))
    if not pairs:
        return None, None

    def rows(ids, block, nobody):
        ids = _pad(jnp.stack([jnp.asarray(x, jnp.int32) for x in ids], axis=2), block).swapaxes(1, 2)
        return jnp.where(ids == 0, nobody, ids)

    # Two ids that nobody has, so that equality is all that is left to ask.
    lowest = jnp.iinfo(jnp.int32).min
    return rows([q for q, _ in pairs], sizes.queries, lowest), rows([k for _, k in pairs], sizes.keys, lowest + 1)


def _pad(x, block: int):
    """`B T ...` with zeros behind T, up to a multiple of the block."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))


def _split(x, parts: int):
    """`B S ...` as `parts B S/parts ...`."""
    return jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)
