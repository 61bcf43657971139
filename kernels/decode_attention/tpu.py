"""Decoding as a Pallas kernel for TPUs: it reads each key and value that somebody sees once, and little else.

A step takes the same slots of several key heads; all queries that share a head (G query heads times T tokens, R rows)
go through the matrix unit together. Which blocks of slots hold a visible key is found on the device, and the grid is
as long as their list: the others are neither copied nor visited. The softmax is the running one of FlashAttention
(arXiv 2205.14135, algorithm 1). Eight-bit values become bfloat16 in VMEM, exactly; their scales are put on the logits
and on the weights, which are few.

Vectors that don't fill the 128 lanes of a tile would be padded there, in HBM too: XLA keeps such arrays with the slots
in the lanes. The kernel reads them as they lie, and a head of 64 costs half of one of 128.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels import varying
from kernels.attention.mask import Mask, visible
from kernels.backends import left_to_xla
from kernels.decode_attention.quantized import QuantizedVectors
from kernels.precision import precision

MAX_QUERIES = 31  # tokens: which of them see a slot is one int32
STEP_SECONDS = 1.5e-6  # that a step's copy should take: less is latency, more is read in vain at a row's end
MAX_SLOTS = 2048
VMEM = 48 * 1024 * 1024
HIDDEN = float(jnp.finfo(jnp.float32).min) / 2


class Blocks(NamedTuple):
    """What one step reads."""

    heads: int
    slots: int


class Work(NamedTuple):
    """Which blocks are visited, in order: int32 codes of (row, block, whether every query sees all of it)."""

    codes: Int[Array, " W"]  # and behind the last one codes of no row
    count: Int[Array, ""]
    shift: int  # bits of the block's number

    def row(self, code):
        return lax.shift_right_logical(code, self.shift + 1)

    def block(self, code):
        return lax.shift_right_logical(code, 1) & ((1 << self.shift) - 1)


def refusal(q, k, v, mask: Mask, scale: float, logit_softcap, sinks) -> str | None:
    if q.dtype == jnp.float64:
        return "TPUs have no float64"
    if left_to_xla():
        return "XLA can't split a kernel over a mesh: say by spec how rows and heads lie"
    if reason := varying.refusal((q, k, v, mask, sinks)):
        return reason
    if q.shape[1] > MAX_QUERIES:
        return f"it takes at most {MAX_QUERIES} new tokens, found {q.shape[1]}: kernels.attention is for more"
    return None


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedVectors,
    v: Float[Array, "B K S V"] | QuantizedVectors,
    mask: Mask,
    scale: float,
    logit_softcap: float | None,
    sinks: Float[Array, " N"] | None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """As `reference.decode_attention`.

    blocks: None takes what suits the chip. interpret: on any platform, for tests.
    """
    (k, k_scales), (v, v_scales) = (x if isinstance(x, QuantizedVectors) else (x, None) for x in (k, v))
    (batch, num_queries, num_heads, _), (_, num_kv_heads, slots, _) = q.shape, k.shape
    seen = visible(mask, 0, num_queries, 0, slots)
    bits = _bits(jnp.ones((), bool) if seen is None else seen, batch, num_queries, slots)
    rows = q.reshape(batch, num_queries, num_kv_heads, -1, q.shape[-1]).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, num_kv_heads, -1, q.shape[-1])
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(num_kv_heads, 1, -1), (1, num_queries, 1))
        sinks = sinks.reshape(num_kv_heads, -1, 1)
    blocks = blocks or suitable(rows, k, v)
    out = _call(rows, k, v, bits, k_scales, v_scales, sinks, num_queries, scale, logit_softcap, blocks, interpret)
    out = out.reshape(batch, num_kv_heads, num_queries, -1, v.shape[-1]).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, num_queries, num_heads, -1)


def suitable(rows: Float[Array, "B K R H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S V"]) -> Blocks:
    """Blocks whose copy takes about `STEP_SECONDS` on the chip that is compiled for, and that fit its VMEM."""
    chip = pltpu.get_tpu_info()
    heads, slots = k.shape[1:3]
    token = sum(pl.cdiv(x.shape[-1], 32) * 32 * x.dtype.itemsize for x in (k, v))  # of one head, as memory holds it
    logits = 4 * 4 * pl.cdiv(rows.shape[2], 8) * 8  # a token's, in float32, while they become weights
    room = min(STEP_SECONDS * chip.mem_bw_bytes_per_second / token, VMEM / 2 / (2 * token + logits))
    # The blocks of scales take all heads, or a multiple of 8 (a tile's sublanes).
    step = 1 if min(k.dtype.itemsize, v.dtype.itemsize) > 1 else 8
    while heads % (2 * step) == 0 and room / heads < 256:
        heads //= 2
    size = 1 << (max(int(room / heads), 128).bit_length() - 1)  # 128, or the next power of two below
    return Blocks(heads, min(size, MAX_SLOTS, pl.cdiv(slots, 128) * 128))


def _bits(seen, batch: int, num_queries: int, slots: int) -> Int[Array, "B S"]:
    """Bit t of a slot: query t sees it."""
    seen = jnp.broadcast_to(seen, (batch, num_queries, slots)).astype(jnp.int32)
    return jnp.sum(seen << jnp.arange(num_queries, dtype=jnp.int32)[:, None], axis=1)


def _work(bits: Int[Array, "B S"], num_queries: int, slots: int) -> Work:
    """Blocks with a visible slot; the first one of a row without any, so that somebody writes its zeros."""
    batch, count = bits.shape[0], bits.shape[1] // slots
    bits = bits.reshape(batch, count, slots)
    live = jnp.any(bits != 0, axis=2)
    live = live.at[:, 0].set(live[:, 0] | ~jnp.any(live, axis=1))
    whole = jnp.all(bits == (1 << num_queries) - 1, axis=2)
    shift = (count - 1).bit_length()
    row, block = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.arange(count, dtype=jnp.int32)
    codes = (row << (shift + 1)) | (block << 1) | whole
    codes = jnp.sort(jnp.where(live, codes, jnp.iinfo(jnp.int32).max).reshape(-1))
    return Work(jnp.append(codes, jnp.iinfo(jnp.int32).max), jnp.sum(live, dtype=jnp.int32), shift)


def _call(rows, k, v, bits, k_scales, v_scales, sinks, num_queries, scale, logit_softcap, blocks, interpret):
    """Rows `B K R H` to `B K R V`."""
    (batch, num_kv_heads, num_rows, width), slots, v_width = rows.shape, k.shape[2], v.shape[-1]
    heads, size = blocks
    bits = jnp.pad(bits, ((0, 0), (0, -slots % size)))
    work = _work(bits, num_queries, size)

    def by_row(head, step, codes):
        return work.row(codes[step]), head, 0, 0

    def by_block(head, step, codes):
        return work.row(codes[step]), head, work.block(codes[step]), 0

    def turned_by_block(head, step, codes):
        return work.row(codes[step]), head, 0, work.block(codes[step])

    def scales_by_block(head, step, codes):
        return work.row(codes[step]), head, work.block(codes[step])

    def bits_by_block(head, step, codes):
        return work.row(codes[step]), 0, work.block(codes[step])

    scales = pl.BlockSpec((None, heads, size), scales_by_block)
    in_specs = [
        pl.BlockSpec((None, heads, num_rows, width), by_row),
        *(
            pl.BlockSpec((None, heads, x.shape[-1], size), turned_by_block)
            if _slots_in_lanes(x)
            else pl.BlockSpec((None, heads, size, x.shape[-1]), by_block)
            for x in (k, v)
        ),
        pl.BlockSpec((None, 1, size), bits_by_block),
        None if k_scales is None else scales,
        None if v_scales is None else scales,
        None if sinks is None else pl.BlockSpec((heads, num_rows, 1), lambda head, step, codes: (head, 0, 0)),
    ]
    turned = tuple(_slots_in_lanes(x) for x in (k, v))
    body = functools.partial(_body, work.row, turned, num_queries, scale, logit_softcap)
    column = pltpu.VMEM((heads, num_rows, 1), jnp.float32)
    moved = [x.size * x.dtype.itemsize for x in (rows, k, v, bits, k_scales, v_scales) if x is not None]
    moved.append(rows.size // width * v_width * rows.dtype.itemsize)  # the output
    logits = batch * num_kv_heads * num_rows * slots
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_kv_heads // heads, work.count),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((None, heads, num_rows, v_width), by_row),
            scratch_shapes=[column, column, pltpu.VMEM((heads, num_rows, v_width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, num_kv_heads, num_rows, v_width), rows.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=pl.CostEstimate(
            flops=2 * logits * (width + v_width), bytes_accessed=sum(moved), transcendentals=logits
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        work.codes,
        rows,
        *(x.swapaxes(2, 3) if _slots_in_lanes(x) else x for x in (k, v)),
        bits[:, None],
        k_scales,
        v_scales,
        sinks,
    )


def _slots_in_lanes(x) -> bool:
    return x.shape[-1] % 128 != 0


def _body(row_of, turned, num_queries, scale, softcap, codes, *refs):
    q_ref, k_ref, v_ref, bits_ref, k_scales, v_scales, sinks, out_ref, top_ref, total_ref, sum_ref = refs
    step = pl.program_id(1)
    code = codes[step]
    row, whole = row_of(code), (code & 1) == 1

    @pl.when((step == 0) | (row_of(codes[jnp.maximum(step - 1, 0)]) != row))
    def _first():
        top_ref[...] = jnp.full(top_ref.shape, HIDDEN) if sinks is None else sinks[...]
        total_ref[...] = jnp.full(total_ref.shape, 0.0 if sinks is None else 1.0)
        sum_ref[...] = jnp.zeros(sum_ref.shape)

    def attend(seen, seen_by_any):
        q = q_ref[...]
        logits = _dot(q, k_ref[...].astype(q.dtype), 1 if turned[0] else 2) * scale
        if k_scales is not None:
            logits *= k_scales[...][:, None]
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        if seen is not None:
            logits = jnp.where(seen, logits, HIDDEN)
        top = jnp.maximum(top_ref[...], jnp.max(logits, axis=2, keepdims=True))
        weights, kept = jnp.exp(logits - top), jnp.exp(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = total_ref[...] * kept + jnp.sum(weights, axis=2, keepdims=True)
        v = v_ref[...].astype(q.dtype)
        if v_scales is not None:
            weights *= v_scales[...][:, None]
        if seen is not None:  # 0 · NaN is NaN
            weights = weights if v_scales is None else jnp.where(seen, weights, 0)
            v = jnp.where(seen_by_any, v, jnp.zeros((), v.dtype))
        sum_ref[...] = sum_ref[...] * kept + _dot(weights.astype(q.dtype), v, 2 if turned[1] else 1)

    @pl.when(whole)
    def _all_of_it():
        attend(None, None)

    @pl.when(~whole)
    def _some_of_it():
        bits = bits_ref[...]
        token = lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], bits.shape[1]), 0) // (q_ref.shape[1] // num_queries)
        seen = (lax.shift_right_logical(jnp.broadcast_to(bits, token.shape), token) & 1) == 1
        by_any = bits if turned[1] else jnp.broadcast_to(bits, (8, bits.shape[1])).T[:, :1]
        attend(seen[None], (by_any != 0)[None])

    @pl.when(row_of(codes[step + 1]) != row)
    def _last():
        out_ref[...] = jnp.where(top_ref[...] != HIDDEN, sum_ref[...] / total_ref[...], 0).astype(out_ref.dtype)


def _dot(a, b, b_axis: int):
    """Of each head, over a's last axis and b's `b_axis`, summed in float32."""
    dimensions = (((2,), (b_axis,)), ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, precision=precision(a.dtype), preferred_element_type=jnp.float32)
