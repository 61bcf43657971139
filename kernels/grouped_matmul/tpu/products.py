"""Rows times their group's matrix, for TPUs."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul.tpu.tiles import ALIGNMENT, Tiles
from kernels.grouped_matmul.tpu.visits import of_tiles


def precision(dtype) -> lax.Precision:
    """float32 is not rounded to bfloat16 on the way into the matrix unit."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def loop(count: int, body) -> None:
    """`body(i)` for each i; without a loop if there is one, so that its i is known."""
    body(0) if count == 1 else lax.fori_loop(0, count, lambda i, _: body(i), None)


def products(x, w, group_sizes, turned: bool, tiles: Tiles, memory: int, interpret: bool = False):
    """x[m] @ w[group of m] (`turned`: w is E F D) in x's type; 0 behind the last group."""
    rows, inner = x.shape
    width = w.shape[1] if turned else w.shape[2]
    visits = of_tiles(group_sizes, rows, tiles.rows)
    block = (None, tiles.columns, inner) if turned else (None, inner, tiles.columns)
    contract = ((1,), (1 if turned else 0,)), ((), ())

    def kernel(tile, group, ends, x, w, y):
        step = pl.program_id(1)
        mine, top = group[step], tile[step] * tiles.rows
        start = jnp.where(mine > 0, ends[jnp.maximum(mine - 1, 0)], 0) - top
        low, high = jnp.maximum(start, 0), jnp.minimum(ends[mine] - top, tiles.rows)

        @pl.when((step == 0) | (tile[jnp.maximum(step - 1, 0)] != tile[step]))
        def _():
            y[...] = jnp.zeros_like(y)

        def product(first, size):
            """Of `size` rows from `first`, or from earlier where the tile ends: those are computed once more."""
            first = pl.multiple_of(jnp.minimum(first, tiles.rows - size), ALIGNMENT)
            at = pl.ds(first, size)

            def some_columns(n):
                columns = pl.ds(n * tiles.part, tiles.part)
                found = lax.dot_general(
                    x[at],
                    w[columns, :] if turned else w[:, columns],
                    contract,
                    precision=precision(x.dtype),
                    preferred_element_type=jnp.float32,
                )
                row = first + lax.broadcasted_iota(jnp.int32, found.shape, 0)
                mine = (row >= low) & (row < high)
                y[at, columns] = jnp.where(mine, found, y[at, columns].astype(jnp.float32)).astype(y.dtype)

            loop(tiles.columns // tiles.part, some_columns)

        begin = low // ALIGNMENT * ALIGNMENT
        length = jnp.maximum(high - begin, 0)
        half = tiles.product // 2
        # What is left over after whole products: nothing, a half, or one more.
        whole = (length + half - 1) // tiles.product
        left = length - whole * tiles.product

        def one(i, _):
            product(begin + i * tiles.product, tiles.product)

        lax.fori_loop(0, whole, one, None)

        @pl.when(left > 0)
        def _():
            product(begin + whole * tiles.product, half)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(-(-width // tiles.columns), visits.count),
        in_specs=[
            pl.BlockSpec((tiles.rows, inner), lambda n, i, tile, group, ends: (tile[i], 0)),
            pl.BlockSpec(block, lambda n, i, tile, group, ends: (group[i], n, 0) if turned else (group[i], 0, n)),
        ],
        out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda n, i, tile, group, ends: (tile[i], n)),
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * width,
            bytes_accessed=(x.size + rows * width) * x.dtype.itemsize + w.size * w.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(visits.tile, visits.group, visits.ends, x, w)
