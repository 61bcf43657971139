"""The forward kernel: FlashAttention-2's online softmax (arXiv 2307.08691, algorithm 1) over a list of live blocks."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu.blocks import FIRST, LAST, NOTHING, Blocks
from kernels.attention.tpu.tile import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    Logit,
    Maps,
    Place,
    Seen,
    compiler_params,
    dot,
    tiles,
    visible,
)
from kernels.attention.tpu.tuning import Sizes


def forward(
    blocks: Blocks, numbers, q, k, v, q_ids, k_ids, sinks, *, bounded: bool, seen: Seen, logit: Logit, sizes: Sizes
):
    """Output `B N V T` in q's type, and float32 `B N 2 T` of the keys alone: the highest z = q·k (`tile.Logit`) and the
    sum of the weights relative to it, 0 where a query sees none. Their log-sum-exp would lose digits of large logits.

    numbers: int32 `1 3` or `B 3`: q_offset, prefix_length, kv_length. q: `B N H T`, k: `B K S H`, v: `B K V S`.
    q_ids, k_ids: int32 `B R T`, `B R S`, or None. sinks: float32 `N`, or None. T and S are multiples of the blocks'.
    bounded: no logit is farther from 0 than `tile.MAX_LOGIT`, so that weights are exp(logit) and no maximum is kept (0
    is given for it). Weights of 1 are exact in bfloat16, others are not: the running maximum is the more exact form.
    """
    batch, num_heads, head_dim, num_queries = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    v_dim, group = v.shape[2], num_heads // num_kv_heads
    heads = sizes.heads
    kv_heads = max(heads // group, 1)

    at = Maps.of(blocks.table.shape[0], lambda n: n * heads // group // kv_heads)
    in_specs = [
        pl.BlockSpec((1, heads, head_dim, sizes.queries), at.queries),
        pl.BlockSpec((1, kv_heads, sizes.keys, head_dim), at.keys),
        pl.BlockSpec((1, kv_heads, v_dim, sizes.keys), at.key_columns),
    ]
    arrays = [q, k, v]
    if q_ids is not None:
        in_specs.append(pl.BlockSpec((1, q_ids.shape[1], sizes.queries), at.query_ids))
        in_specs.append(pl.BlockSpec((1, k_ids.shape[1], sizes.keys), at.key_ids))
        arrays += [q_ids, k_ids]
    prefetched = [blocks.table, numbers] + ([] if sinks is None else [sinks])
    pairs = batch * num_heads * blocks.density * num_queries * num_keys
    return pl.pallas_call(
        functools.partial(_kernel, bounded, blocks, seen, logit, sizes, group, q_ids is not None, sinks is not None),
        out_shape=(
            jax.ShapeDtypeStruct((batch, num_heads, v_dim, num_queries), q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 2, num_queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, num_heads // heads, blocks.visits),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, heads, v_dim, sizes.queries), at.queries),
                pl.BlockSpec((1, heads, 2, sizes.queries), at.queries),
            ],
            scratch_shapes=[
                pltpu.VMEM((heads, 1, sizes.queries), jnp.float32),
                pltpu.VMEM((heads, 8, sizes.queries), jnp.float32),
                pltpu.VMEM((heads, v_dim, sizes.queries), jnp.float32),
            ],
        ),
        compiler_params=compiler_params(sizes, ("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * pairs * (head_dim + v_dim)),
            transcendentals=int(pairs),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, q)),
        ),
        name="attention_forward",
    )(*prefetched, *arrays)


def _kernel(bounded, blocks, seen, logit, sizes, group, has_ids, has_sinks, *refs):
    table, numbers, *refs = refs
    sinks, *refs = refs if has_sinks else (None, *refs)
    q, k, v, *refs = refs
    q_ids, k_ids, *refs = refs if has_ids else (None, None, *refs)
    out, stats, top, total, sums = refs
    b, n, step = (pl.program_id(axis) for axis in range(3))
    entry = table[b if blocks.table.shape[0] > 1 else 0, step]
    row = b if numbers.shape[0] > 1 else 0

    @pl.when(entry & FIRST != 0)
    def _():
        top[...] = jnp.full_like(top, 0 if bounded else LOWEST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def body(kind):
        place = Place(
            kind,
            (entry >> 16) * sizes.queries,
            ((entry >> 4) & 0xFFF) * sizes.keys,
            *(numbers[row, column] for column in range(3)),
        )

        def logits(h, tile):
            first_query, width, first_key, height = tile
            keys = k[0, h // group, first_key : first_key + height]
            z = logit.bound(dot(keys, q[0, h, :, first_query : first_query + width], (1, 0)))
            allowed = visible(
                seen, place, tile, None if q_ids is None else q_ids[0], None if k_ids is None else k_ids[0]
            )
            return z if allowed is None else jnp.where(allowed, z, HIDDEN)

        def softmax(h, tile, z):
            queries = slice(tile[0], tile[0] + tile[1])
            shrink = None
            if not bounded:
                before = top[h, :, queries]
                now = jnp.maximum(before, jnp.max(z, axis=0, keepdims=True))
                shrink, z = jnp.exp2((before - now) * logit.factor), z - now
            weights = jnp.exp2(z * logit.factor)
            # Eight partial sums: a vector register is eight rows high.
            parts = jnp.sum(weights.reshape(-1, 8, weights.shape[1]), axis=0)
            total[h, :, queries] = shrunk(total[h, :, queries], shrink) + parts
            if not bounded:
                top[h, :, queries] = now
            return weights.astype(v.dtype), shrink

        def shrunk(so_far, shrink):
            return so_far if shrink is None else so_far * shrink

        def add(h, tile, weights, shrink):
            first_query, width, first_key, height = tile
            queries = slice(first_query, first_query + width)
            part = dot(v[0, h // group, :, first_key : first_key + height], weights, (1, 0))
            sums[h, :, queries] = shrunk(sums[h, :, queries], shrink) + part

        # A tile's products are asked for before the softmax of the tile before: the compiler roughly keeps this order.
        work = [(h, tile) for h in range(sizes.heads) for tile in tiles(sizes, kind)]
        ahead, waiting = logits(*work[0]), None
        for index, item in enumerate(work):
            z, ahead = ahead, logits(*work[index + 1]) if index + 1 < len(work) else None
            weights = softmax(*item, z)
            if waiting:
                add(*waiting)
            waiting = (*item, *weights)
        add(*waiting)

    for kind in sorted(blocks.kinds - {NOTHING}):
        pl.when(entry & 3 == kind)(functools.partial(body, kind))

    @pl.when(entry & LAST != 0)
    def _():
        for h in range(sizes.heads):
            whole = jnp.sum(total[h], axis=0, keepdims=True)
            stats[0, h, :1], stats[0, h, 1:] = top[h], whole
            if has_sinks:  # in units of exp(maximum): infinite where the sink takes all
                whole = jnp.where(
                    whole > 0, whole + jnp.exp2(sinks[n * sizes.heads + h] * LOG2_E - top[h] * logit.factor), 0
                )
            out[0, h] = (sums[h] * jnp.where(whole > 0, 1 / jnp.where(whole > 0, whole, 1), 0)).astype(out.dtype)
