"""Attention in plain XLA operations, for every platform: blocks of queries, probabilities recomputed in the backward.

The maths is FlashAttention-2's (arXiv 2307.08691, algorithms 1 and 2), a block of queries at a time against whole
rows of keys. Shape letters inside: G query heads that share a key head, R rows of a block (GR flattened in products).
The gradients of k and v are summed as `B K H S`, so that no product needs the large `B K GR S` arrays transposed:
on CPU that copy costs as much as the product.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.mask import Mask, clear_padding, key_range, visible

BLOCK_LOGITS = 4 * 1024 * 1024  # logits that exist at once: 16 MiB in float32
MIN_BLOCK = 16  # rows, however many keys there are
MAX_PIECES = 8  # a causal mask then costs 1/2 + 1/16 of the full one; each piece is compiled by itself
MIN_PIECE = 64  # rows; with fewer, products lose more speed than the skipped keys save


class Piece(NamedTuple):
    """`count` blocks of `rows` queries from `start`, against keys [low, high)."""

    start: int
    rows: int
    count: int
    low: int
    high: int


def plan(batch_heads: int, num_queries: int, num_keys: int, mask: Mask) -> list[Piece]:
    """Pieces that cover all queries, in order."""
    skips = key_range(mask, 0, 1, num_keys) != key_range(mask, num_queries - 1, num_queries, num_keys)
    step = max(MIN_PIECE, -(-num_queries // MAX_PIECES)) if skips else num_queries
    pieces = []
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        low, high = key_range(mask, start, stop, num_keys)
        rows = min(stop - start, max(MIN_BLOCK, BLOCK_LOGITS // (batch_heads * (high - low))))
        blocks, rest = divmod(stop - start, rows)
        pieces.append(Piece(start, rows, blocks, low, high))
        if rest:
            pieces.append(Piece(stop - rest, rest, 1, low, high))
    return pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(q, k, v, mask: Mask, scale: float, logit_softcap: float | None, sinks):
    """As `reference.attention`; memory grows with T + S, forward and backward."""
    return _forward(q, k, v, mask, scale, logit_softcap, sinks)[0]


def _forward(q, k, v, mask, scale, softcap, sinks):
    given = q, k, v
    _, _, v = clear_padding(mask, q, k, v)  # hidden logits are replaced: here only v could leak
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    stats = jnp.promote_types(q.dtype, jnp.float32)
    hidden = _hidden(stats)
    sink = None if sinks is None else sinks.astype(stats).reshape(1, num_kv_heads, -1, 1, 1)
    q_rows, k_rows, v_rows = _group(q, num_kv_heads), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def block(piece, carry, start):
        logits, _ = _logits(_rows(q_rows, start, piece), k_rows, mask, start, piece, scale, softcap)
        top = jnp.max(logits, axis=-1, keepdims=True, initial=hidden)
        top = top if sink is None else jnp.maximum(top, sink)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = total if sink is None else total + jnp.exp(sink - top)
        out = _dot("bkrs,bksh->bkrh", _flat(weights).astype(v.dtype), v_rows[:, :, piece.low : piece.high])
        inverse = jnp.where(top > hidden, 1 / total, 0)  # 0 where a row sees nothing
        return carry, ((out.reshape(*top.shape[:-1], -1) * inverse).astype(q.dtype), top, inverse)

    pieces = plan(batch * num_heads, num_queries, num_keys, mask)
    blocks = [_each_block(block, (), piece)[1] for piece in pieces]
    out, top, inverse = (_ungroup(parts) for parts in zip(*blocks, strict=True))
    lse = jnp.where(inverse > 0, top - jnp.log(inverse), -jnp.inf)[..., 0]
    # The two are kept rather than lse: where logits are large, lse has no digits left for log(total).
    return (out, lse), (given, mask, sinks, out, top, inverse)


def _backward(scale, softcap, saved, cotangents):
    (q, k, v), mask, sinks, out, top, inverse = saved
    q, k, v = clear_padding(mask, q, k, v)
    d_out, d_lse = cotangents
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    delta = jnp.sum(d_out.astype(top.dtype) * out, axis=-1, keepdims=True) - d_lse[..., None]
    # p = weights * inverse; the small arrays take the factor, so that p is never made.
    delta, d_out = (jnp.where(inverse > 0, x * inverse, 0) for x in (delta, d_out))
    q_rows, d_out_rows, delta, top = (_group(x, num_kv_heads) for x in (q, d_out.astype(v.dtype), delta, top))
    q_columns, d_out_columns = (x.transpose(0, 1, 4, 2, 3) for x in (q_rows, d_out_rows))
    k_rows, v_rows = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def block(piece, sums, start):
        keys = slice(piece.low, piece.high)
        logits, slope = _logits(_rows(q_rows, start, piece), k_rows, mask, start, piece, scale, softcap)
        weights = jnp.exp(logits - _rows(top, start, piece))
        d_p = _dot("bkrh,bksh->bkrs", _flat(_rows(d_out_rows, start, piece)), v_rows[:, :, keys])
        d_logits = weights * (d_p.reshape(weights.shape) - _rows(delta, start, piece)) * slope
        weights, d_logits = _flat(weights).astype(v.dtype), _flat(d_logits).astype(q.dtype)
        d_q = _dot("bkrs,bksh->bkrh", d_logits, k_rows[:, :, keys])
        d_k = _dot("bkhr,bkrs->bkhs", _columns(q_columns, start, piece), d_logits)
        d_v = _dot("bkhr,bkrs->bkhs", _columns(d_out_columns, start, piece), weights)
        sums = tuple(total.at[..., keys].add(part) for total, part in zip(sums, (d_k, d_v), strict=True))
        return sums, d_q.reshape(*logits.shape[:-1], -1).astype(q.dtype)

    sums = tuple(jnp.zeros_like(x.swapaxes(2, 3), top.dtype) for x in (k_rows, v_rows))
    d_q = []
    for piece in plan(batch * num_heads, num_queries, num_keys, mask):
        sums, part = _each_block(block, sums, piece)
        d_q.append(part)
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(k.dtype) for x in sums)
    d_sinks = None
    if sinks is not None:
        weights = jnp.exp(sinks.astype(top.dtype).reshape(1, num_kv_heads, -1, 1, 1) - top)
        d_sinks = -jnp.sum(weights * delta, axis=(0, 3, 4)).reshape(sinks.shape).astype(sinks.dtype)
    return _ungroup(d_q), d_k, d_v, None, d_sinks


attention.defvjp(_forward, _backward)


def _logits(q, k_rows, mask: Mask, start, piece: Piece, scale, softcap):
    """Masked logits `B K G R S`, and d logit / d (q · k): the scale, times the soft-cap's slope where there is one."""
    logits = _dot("bkrh,bksh->bkrs", _flat(q), k_rows[:, :, piece.low : piece.high]) * scale
    logits, slope = logits.reshape(*q.shape[:-1], -1), scale
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, scale * (1 - jnp.square(bounded))
    seen = visible(mask, start, piece.rows, piece.low, piece.high - piece.low)
    if seen is not None:
        logits = jnp.where(seen[:, None, None], logits, _hidden(logits.dtype))
    return logits, slope


def _hidden(dtype) -> float:
    """The logit of a hidden key. Finite, so that rows that see nothing make no NaN on the way."""
    return float(jnp.finfo(dtype).min) / 2


def _each_block(step, carry, piece: Piece):
    """Runs `step(piece, carry, start)` over a piece's blocks; their outputs `B K G R ...` side by side in R."""
    if piece.count == 1:
        return step(piece, carry, piece.start)
    starts = piece.start + piece.rows * jnp.arange(piece.count)
    carry, blocks = lax.scan(functools.partial(step, piece), carry, starts)
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1]), blocks)


def _dot(spec: str, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _group(x, num_kv_heads: int):
    """`B T N H` to `B K G T H`."""
    batch, length, num_heads, width = x.shape
    return x.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, width).transpose(0, 2, 3, 1, 4)


def _ungroup(parts):
    """A list of `B K G R H` to `B T N H`."""
    x = jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _rows(x, start, piece: Piece):
    return lax.dynamic_slice_in_dim(x, start, piece.rows, axis=3)


def _flat(x):
    """`B K G R ...` to `B K GR ...`."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _columns(x, start, piece: Piece):
    """A block of `B K H G T` as `B K H GR`."""
    x = lax.dynamic_slice_in_dim(x, start, piece.rows, axis=4)
    return x.reshape(*x.shape[:3], -1)
