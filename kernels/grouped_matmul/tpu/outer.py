"""The gradient of the matrices: a product over each group's rows, for TPUs."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul.tpu.products import loop, precision
from kernels.grouped_matmul.tpu.tiles import ALIGNMENT, Tiles
from kernels.grouped_matmul.tpu.visits import of_groups, own_rows

SUM_OF_ROWS = ((0,), (0,)), ((), ())


def outer(a, b, group_sizes, dtype, tiles: Tiles, memory: int, interpret: bool = False):
    """Sum over the rows of each group of a[m] b[m]^T: E A B, summed in float32; 0 for a group without rows."""
    (rows, left), right, groups = a.shape, b.shape[1], len(group_sizes)
    visits = of_groups(group_sizes, rows, tiles.rows)

    def kernel(tile, group, ends, a, b, out, total):
        step, last = pl.program_id(2), pl.num_programs(2) - 1
        low, high = own_rows(tile, group, ends, step, tiles.rows)

        @pl.when((step == 0) | (group[jnp.maximum(step - 1, 0)] != group[step]))
        def _():
            total[...] = jnp.zeros_like(total)

        def product(at, clean):
            right = clean(b[at])

            def some_of_left(n):
                some = pl.ds(n * tiles.part, tiles.part)
                total[some] += lax.dot_general(
                    clean(a[at, some]),
                    right,
                    SUM_OF_ROWS,
                    precision=precision(a.dtype),
                    preferred_element_type=jnp.float32,
                )

            loop(tiles.inner // tiles.part, some_of_left)

        def one(i, _):
            wanted = begin + i * tiles.product
            # Earlier where the tile ends; what was summed before is left out.
            first = pl.multiple_of(jnp.minimum(wanted, tiles.rows - tiles.product), ALIGNMENT)
            since, at = jnp.maximum(wanted, low), pl.ds(first, tiles.product)

            def own(rows):
                row = first + lax.broadcasted_iota(jnp.int32, rows.shape, 0)
                # Of both sides: 0 times NaN is NaN.
                return jnp.where((row >= since) & (row < high), rows.astype(jnp.float32), 0).astype(rows.dtype)

            whole = (since == first) & (first + tiles.product <= high)
            pl.when(whole)(lambda: product(at, lambda rows: rows))
            pl.when(~whole)(lambda: product(at, own))

        begin = low // ALIGNMENT * ALIGNMENT
        lax.fori_loop(0, pl.cdiv(jnp.maximum(high - begin, 0), tiles.product), one, None)

        @pl.when((step == last) | (group[jnp.minimum(step + 1, last)] != group[step]))
        def _():
            out[...] = total[...].astype(out.dtype)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(-(-left // tiles.inner), -(-right // tiles.columns), visits.count),
        in_specs=[
            pl.BlockSpec((tiles.rows, tiles.inner), lambda m, n, i, tile, group, ends: (tile[i], m)),
            pl.BlockSpec((tiles.rows, tiles.columns), lambda m, n, i, tile, group, ends: (tile[i], n)),
        ],
        out_specs=pl.BlockSpec((None, tiles.inner, tiles.columns), lambda m, n, i, tile, group, ends: (group[i], m, n)),
        scratch_shapes=[pltpu.VMEM((tiles.inner, tiles.columns), jnp.float32)],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((groups, left, right), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * left * right,
            bytes_accessed=rows * (left + right) * a.dtype.itemsize + groups * left * right * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul_outer",
    )(visits.tile, visits.group, visits.ends, a, b)
