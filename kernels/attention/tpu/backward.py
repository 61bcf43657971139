"""The backward kernel: all three gradients from one recomputation of the probabilities, over a list of live blocks.

FlashAttention-2 (arXiv 2307.08691, algorithm 2) with queries outside: dQ of a query block is summed while its keys pass
by, and dK, dV of one key head stay in fast memory as long as its query heads pass by. That memory grows with S alone,
whatever the number of query heads, and no partial sums go through the main memory; long rows come in pieces of keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu.blocks import FIRST, NOTHING, Blocks
from kernels.attention.tpu.tile import HIDDEN, Logit, Maps, Place, Seen, compiler_params, dot, tiles, visible
from kernels.attention.tpu.tuning import Sizes


def backward(blocks: Blocks, numbers, q, k, k_columns, v, q_ids, k_ids, d_out, stats, *, seen, logit, sizes: Sizes):
    """d_q `B N H T`, d_k `B K H S`, d_v `B K V S` in float32, of z = q·k: the scale is left to the caller.

    Args as in `forward`; k_columns: `B K H S`. v: `B K S V`. d_out: `B N V T`. stats: float32 `B N 3 T`: highest z,
    log2 of the sum of weights relative to it (NEVER for a row that sees nothing), rowsum(d_out · out) - d_lse.
    """
    batch, num_heads, head_dim, num_queries = q.shape
    num_kv_heads, num_keys, v_dim = v.shape[1:]
    group = num_heads // num_kv_heads

    at = Maps.of(blocks.table.shape[0], lambda n: n // group)
    in_specs = [
        pl.BlockSpec((1, 1, head_dim, sizes.queries), at.queries),
        pl.BlockSpec((1, 1, sizes.keys, head_dim), at.keys),
        pl.BlockSpec((1, 1, head_dim, sizes.keys), at.key_columns),
        pl.BlockSpec((1, 1, sizes.keys, v_dim), at.keys),
        pl.BlockSpec((1, 1, v_dim, sizes.queries), at.queries),
        pl.BlockSpec((1, 1, 3, sizes.queries), at.queries),
    ]
    arrays = [q, k, k_columns, v, d_out, stats]
    if q_ids is not None:
        in_specs.append(pl.BlockSpec((1, q_ids.shape[1], sizes.queries), at.query_ids))
        in_specs.append(pl.BlockSpec((1, k_ids.shape[1], sizes.keys), at.key_ids))
        arrays += [q_ids, k_ids]
    pairs = batch * num_heads * blocks.density * num_queries * num_keys
    key_blocks = num_keys // sizes.keys
    d_q, d_k, d_v = pl.pallas_call(
        functools.partial(_kernel, blocks, seen, logit, sizes, group, q_ids is not None),
        out_shape=(
            jax.ShapeDtypeStruct((batch, num_heads, head_dim, num_queries), jnp.float32),
            jax.ShapeDtypeStruct((batch, num_kv_heads, key_blocks, head_dim, sizes.keys), jnp.float32),
            jax.ShapeDtypeStruct((batch, num_kv_heads, key_blocks, v_dim, sizes.keys), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, blocks.visits),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, 1, head_dim, sizes.queries), at.queries),
                pl.BlockSpec((1, 1, key_blocks, head_dim, sizes.keys), lambda b, n, *_: (b, n // group, 0, 0, 0)),
                pl.BlockSpec((1, 1, key_blocks, v_dim, sizes.keys), lambda b, n, *_: (b, n // group, 0, 0, 0)),
            ],
        ),
        compiler_params=compiler_params(sizes, ("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * pairs * (3 * head_dim + 2 * v_dim)),
            transcendentals=int(pairs),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, q, q, k, k, v, v)),
        ),
        name="attention_backward",
    )(blocks.table, numbers, *arrays)
    return d_q, *(x.swapaxes(2, 3).reshape(batch, num_kv_heads, -1, num_keys) for x in (d_k, d_v))


def _kernel(blocks, seen: Seen, logit: Logit, sizes, group, has_ids, *refs):
    table, numbers, q, k, k_columns, v, d_out, stats, *refs = refs
    q_ids, k_ids, *refs = refs if has_ids else (None, None, *refs)
    d_q, d_k, d_v = refs
    b, n, step = (pl.program_id(axis) for axis in range(3))
    entry = table[b if blocks.table.shape[0] > 1 else 0, step]
    row = b if numbers.shape[0] > 1 else 0
    key_block = (entry >> 4) & 0xFFF

    @pl.when((n % group == 0) & (step == 0))
    def _():
        d_k[...] = jnp.zeros_like(d_k)
        d_v[...] = jnp.zeros_like(d_v)

    @pl.when(entry & FIRST != 0)
    def _():
        d_q[...] = jnp.zeros_like(d_q)

    def body(kind):
        place = Place(
            kind,
            (entry >> 16) * sizes.queries,
            key_block * sizes.keys,
            *(numbers[row, column] for column in range(3)),
        )

        def products(tile):
            queries, keys = _slices(tile)
            return dot(k[0, 0, keys], q[0, 0, :, queries], (1, 0)), dot(v[0, 0, keys], d_out[0, 0, :, queries], (1, 0))

        def gradients(tile, z, d_p):
            queries, _ = _slices(tile)
            z = logit.bound(z)
            allowed = visible(
                seen, place, tile, None if q_ids is None else q_ids[0], None if k_ids is None else k_ids[0]
            )
            shown = z if allowed is None else jnp.where(allowed, z, HIDDEN)
            top, total, delta = (stats[0, 0, row : row + 1, queries] for row in range(3))
            p = jnp.exp2((shown - top) * logit.factor - total)
            d_z = p * (d_p - delta)
            d_z = d_z if logit.inner is None else d_z * (1 - z * z)
            return p.astype(q.dtype), d_z.astype(q.dtype)

        def add(tile, p, d_z):
            queries, keys = _slices(tile)
            d_v[0, 0, key_block, :, keys] += dot(d_out[0, 0, :, queries], p, (1, 1))
            d_k[0, 0, key_block, :, keys] += dot(q[0, 0, :, queries], d_z, (1, 1))
            d_q[0, 0, :, queries] += dot(k_columns[0, 0, :, keys], d_z, (1, 0))

        work = tiles(sizes, kind)
        ahead, waiting = products(work[0]), None
        for index, tile in enumerate(work):
            now, ahead = ahead, products(work[index + 1]) if index + 1 < len(work) else None
            found = gradients(tile, *now)
            if waiting:
                add(*waiting)
            waiting = (tile, *found)
        add(*waiting)

    for kind in sorted(blocks.kinds - {NOTHING}):
        pl.when(entry & 3 == kind)(functools.partial(body, kind))


def _slices(tile) -> tuple[slice, slice]:
    """A tile's queries and keys within its block."""
    first_query, width, first_key, height = tile
    return slice(first_query, first_query + width), slice(first_key, first_key + height)
