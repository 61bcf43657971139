"""Attention in plain XLA operations, for every platform: blocks of queries, probabilities recomputed in the backward.

The maths is FlashAttention-2's (arXiv 2307.08691, algorithms 1 and 2), a block of queries at a time against whole
rows of keys. Shape letters inside: G query heads that share a key head, R rows of a block (GR flattened in products).

Long texts take one head after the other: a block then holds more of its queries, so that d_k and d_v are added to less
often, and stays in the cache.

Two things are as they are for XLA's CPU compiler. It makes one loop of several heads' product, softmax and product,
logits never leaving the cache, if each value inside has one reader: so the scale is in q, and the backward of several
heads normalises anew; that of one head reads what the forward saved. (A mask breaks that loop, being a select; added
as numbers it would not, but making those costs more.) And the gradients of k and v are summed as `B K H S`, so that no
product needs the large `B K GR S` arrays transposed: that copy costs as much as the product.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.mask import Mask, all_see_themselves, clear_padding, key_range, visible
from kernels.backends import left_to_xla
from kernels.precision import precision

TOGETHER = 8 * 1024 * 1024  # logits in all; of more, one head's after the other's are made
ROWS_LOGITS = 2 * 1024 * 1024  # of a head: as many rows of the batch go together, as small products waste cores
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
    *parts, live = _each_head(functools.partial(_forward_heads, scale, softcap), mask, sinks, q, k, v)
    out, total, top = map(_ungroup, parts)
    lse = top + jnp.log(total)
    if live is not None:
        live = live[:, 0, 0, :, :, None]
        lse = jnp.where(live, lse, -jnp.inf if sinks is None else top)
    return (out, lse[..., 0]), (q, k, v, mask, sinks, out, total, top, live)


def _forward_heads(scale, softcap, mask, sinks, q, k, v):
    """Output `B K G T H`; the softmax's total and top, `B K G T 1`; which rows see a key, `B 1 1 T 1`, None: all do."""
    num_queries, num_heads = q.shape[1:3]
    num_keys, num_kv_heads = k.shape[1:3]
    q, k, v = clear_padding(mask, q, k, v)
    q, _, scale = _fold(q, scale)
    ask_live = not all_see_themselves(mask, num_queries, num_keys)
    q_rows, k_rows, v_rows = _group(q, num_kv_heads), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def attend(piece, carry, start):
        logits, _, live = _logits(_rows(q_rows, start, piece), k_rows, mask, start, piece, scale, softcap, ask_live)
        weights, total, top = _softmax(logits, sinks)
        out = _dot("bkrs,bksh->bkrh", weights.astype(v.dtype), v_rows[:, :, piece.low : piece.high]) / total
        if live is not None:
            out, live = jnp.where(live, out, 0), jnp.broadcast_to(live, out.shape[:1] + live.shape[1:])
            live = live[:, :, None, : piece.rows]
        return carry, (_split(out, piece).astype(q.dtype), _split(total, piece), _split(top, piece), live)

    pieces = plan(len(q) * num_heads, num_queries, num_keys, mask)
    parts = zip(*(_each_block(attend, (), piece)[1] for piece in pieces), strict=True)
    return tuple(None if x[0] is None else jnp.concatenate(x, axis=3) for x in parts)


def _backward(scale, softcap, saved, cotangents):
    q, k, v, mask, sinks, out, *statistics, live = saved
    # Else XLA finds that the forward has made these logits, and keeps them all from there to here.
    q, k, v = lax.optimization_barrier((q, k, v))
    d_out, d_lse = cotangents
    if live is not None:  # a row that sees no key has no gradient, whatever it is told; a sink gives it an lse
        d_out = jnp.where(live, d_out, 0)
        d_lse = d_lse if sinks is not None else jnp.where(live[..., 0], d_lse, 0)
    step = functools.partial(_backward_heads, scale, softcap)
    rows = out, d_out.astype(v.dtype), d_lse[..., None], *(() if _rows_at_once(q, k) is None else statistics)
    d_q, d_k, d_v, d_sinks = _each_head(step, mask, sinks, q, k, v, *rows)
    d_k, d_v = (_of_key_heads(x, like).astype(like.dtype) for x, like in ((d_k, k), (d_v, v)))
    return _ungroup(d_q), d_k, d_v, None, None if sinks is None else d_sinks.sum(0).reshape(-1).astype(sinks.dtype)


def _backward_heads(scale, softcap, mask, sinks, q, k, v, *rows):
    """The gradients of q `B K G T H`, k and v `B K H S`, sinks `B K G`. `rows` are out, d_out, d_lse (, total, top)."""
    q, k, v = clear_padding(mask, q, k, v)
    q, folded, scale = _fold(q, scale)
    num_queries, num_heads = q.shape[1:3]
    num_keys, num_kv_heads = k.shape[1:3]
    q_rows, *rows = (_group(x, num_kv_heads) for x in (q, *rows))
    q_columns, d_out_columns = (x.transpose(0, 1, 4, 2, 3) for x in (q_rows, rows[1]))
    k_rows, v_rows = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    stats = jnp.promote_types(q.dtype, jnp.float32)

    def block(piece, sums, start):
        keys = slice(piece.low, piece.high)
        logits, slope, _ = _logits(_rows(q_rows, start, piece), k_rows, mask, start, piece, scale, softcap)
        out_piece, d_out_piece, d_lse_piece, *saved = (_flat(_rows(x, start, piece)) for x in rows)
        if saved:
            total, top = saved
            weights = jnp.exp(logits - top)
        else:
            weights, total, top = _softmax(logits, sinks)
        # The total divides rows of the products, not all their weights; but bfloat16 would round those rows.
        share = 1 / total
        weights, share = (weights * share, jnp.ones_like(share)) if q.dtype == jnp.bfloat16 else (weights, share)
        delta = jnp.sum(d_out_piece.astype(stats) * out_piece, axis=-1, keepdims=True) - d_lse_piece
        d_p = _dot("bkrh,bksh->bkrs", d_out_piece, v_rows[:, :, keys])
        d_logits = weights * (d_p - delta)
        d_logits = (d_logits if slope is None else d_logits * slope).astype(q.dtype)
        d_q = _dot("bkrs,bksh->bkrh", d_logits, k_rows[:, :, keys]) * (share * folded)
        q_piece, d_out_piece = (
            (_columns(x, start, piece) * share.swapaxes(2, 3)).astype(x.dtype) for x in (q_columns, d_out_columns)
        )
        d_k = _dot("bkhr,bkrs->bkhs", q_piece, d_logits)
        d_v = _dot("bkhr,bkrs->bkhs", d_out_piece, weights.astype(v.dtype))
        *sums, d_sinks = sums
        sums = [so_far.at[..., keys].add(part) for so_far, part in zip(sums, (d_k, d_v), strict=True)]
        if sinks is not None:
            of_sink = jnp.exp(_sink_column(sinks, logits) - top) / total
            d_sinks -= jnp.sum(_split(of_sink * delta, piece), axis=(3, 4))
        return (*sums, d_sinks), _split(d_q.astype(q.dtype), piece)

    sums = tuple(jnp.zeros_like(x.swapaxes(2, 3), stats) for x in (k_rows, v_rows))
    sums = (*sums, None if sinks is None else jnp.zeros(q_rows.shape[:3], stats))
    d_q = []
    for piece in plan(len(q) * num_heads, num_queries, num_keys, mask):
        sums, part = _each_block(block, sums, piece)
        d_q.append(part)
    return jnp.concatenate(d_q, axis=3), *sums


attention.defvjp(_forward, _backward)


def _rows_at_once(q, k) -> int | None:
    """Rows of the batch whose heads are taken one after the other; None where all heads of all rows go together."""
    (batch, num_queries, num_heads, _), num_keys = q.shape, k.shape[1]
    fitting = [n for n in range(1, batch + 1) if batch % n == 0 and n * num_queries * num_keys <= ROWS_LOGITS]
    rows = max(fitting, default=1)
    small = batch * num_heads * num_queries * num_keys <= TOGETHER or batch // rows * num_heads == 1
    # XLA would gather the heads of a mesh to take them one after the other.
    return None if small or left_to_xla() else rows


def _each_head(step, mask: Mask, sinks, *arrays):
    """`step(mask, sinks, *arrays)`, of long texts for a few rows and one query head after the other; what it gives
    begins with rows and heads. Arrays: q `B T N H`, k `B S K H`, others with N or K heads in the same place.
    """
    (batch, _, num_heads, _), rows = arrays[0].shape, _rows_at_once(*arrays[:2])
    if rows is None:
        return step(mask, sinks, *arrays)

    def cut(x, row, size=rows):
        return lax.dynamic_slice_in_dim(jnp.asarray(x), row, size)

    def one(_, job):
        row, head = job // num_heads * rows, job % num_heads
        its_mask = jax.tree.map(lambda x: cut(x, row) if jnp.ndim(x) else x, mask)
        its_heads = [lax.div(head, num_heads // x.shape[2]) for x in arrays]
        parts = [lax.dynamic_slice_in_dim(cut(x, row), n, 1, axis=2) for x, n in zip(arrays, its_heads, strict=True)]
        return None, step(its_mask, None if sinks is None else cut(sinks, head, 1), *parts)

    def join(x):
        x = x.reshape(-1, num_heads, rows, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(batch, num_heads, *x.shape[3:])

    return jax.tree.map(join, lax.scan(one, None, jnp.arange(batch // rows * num_heads))[1])


def _fold(q, scale: float) -> tuple[jax.Array, float, float]:
    """q with the scale in it, that factor, and the factor that is left for the logits: bfloat16 would round it."""
    return (q, 1.0, scale) if q.dtype == jnp.bfloat16 else (q * scale, scale, 1.0)


def _logits(q, k_rows, mask: Mask, start, piece: Piece, scale, softcap, ask_live=False):
    """Logits `B K GR S`; d logit / d (q · k), None where it is 1; and which rows see a key at all, `B 1 GR 1` or
    `1 1 GR 1`, None where all do or nobody asks. A hidden key's logit is nearly -inf.
    """
    # From here on the mask belongs to this q: JAX would else make it, T x S, ahead of a loop over heads or layers.
    q, start = lax.optimization_barrier((q, jnp.asarray(start)))
    logits = _dot("bkrh,bksh->bkrs", _flat(q), k_rows[:, :, piece.low : piece.high])
    logits, slope = (logits, None) if scale == 1.0 else (logits * scale, scale)
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, scale * (1 - jnp.square(bounded))
    seen = visible(mask, start, piece.rows, piece.low, piece.high - piece.low)
    if seen is None:
        return logits, slope, None
    seen = jnp.broadcast_to(seen, (seen.shape[0], piece.rows, seen.shape[2]))
    seen = jnp.tile(seen, (1, q.shape[2], 1))[:, None]
    # Half the lowest number there is: that of hidden keys less that of seen ones does not overflow.
    logits = jnp.where(seen, logits, float(jnp.finfo(logits.dtype).min) / 2)
    return logits, slope, jnp.any(seen, axis=-1, keepdims=True) if ask_live else None


def _softmax(logits, sinks):
    """exp(logit - top) `B K GR S`, its sum and top `B K GR 1`; a sink takes part in the sum and in top."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    if sinks is None:
        weights = jnp.exp(logits - top)
        return weights, jnp.sum(weights, axis=-1, keepdims=True), top
    sink = _sink_column(sinks, logits)
    top = jnp.maximum(top, sink)
    weights = jnp.exp(logits - top)
    return weights, jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top), top


def _sink_column(sinks, logits):
    """The sink of each row's head, `1 K GR 1`."""
    num_kv_heads, rows = logits.shape[1:3]
    heads = sinks.astype(logits.dtype).reshape(num_kv_heads, -1)
    return jnp.repeat(heads, rows // heads.shape[1], axis=1)[None, :, :, None]


def _each_block(step, carry, piece: Piece):
    """Runs `step(piece, carry, start)` over a piece's blocks; their outputs `B K G R ...` side by side in R."""
    if piece.count == 1:
        return step(piece, carry, piece.start)
    starts = piece.start + piece.rows * jnp.arange(piece.count)
    carry, blocks = lax.scan(functools.partial(step, piece), carry, starts)
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1]), blocks)


def _dot(spec: str, a, b):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(spec, a, b, precision=precision(a.dtype), preferred_element_type=wide)


def _group(x, num_kv_heads: int):
    """`B T N H` to `B K G T H`."""
    batch, length, num_heads, width = x.shape
    return x.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, width).transpose(0, 2, 3, 1, 4)


def _ungroup(x):
    """`B K G T H` to `B T N H`."""
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _of_key_heads(x, like):
    """`B K H S`, or with query heads for key heads, to `B S K H`."""
    x = x.reshape(len(x), like.shape[2], -1, *x.shape[2:])
    return jnp.sum(x, axis=2).transpose(0, 3, 1, 2)


def _rows(x, start, piece: Piece):
    return lax.dynamic_slice_in_dim(x, start, piece.rows, axis=3)


def _flat(x):
    """`B K G R ...` to `B K GR ...`."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _split(x, piece: Piece):
    """`B K GR H` to `B K G R H`."""
    return x.reshape(*x.shape[:2], -1, piece.rows, x.shape[-1])


def _columns(x, start, piece: Piece):
    """A block of `B K H G T` as `B K H GR`."""
    x = lax.dynamic_slice_in_dim(x, start, piece.rows, axis=4)
    return x.reshape(*x.shape[:3], -1)
