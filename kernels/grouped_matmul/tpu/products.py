"""Rows times their group's matrix, for TPUs."""

from collections.abc import Callable
from itertools import islice

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.grouped_matmul.tpu.tiles import ALIGNMENT, Tiles
from kernels.grouped_matmul.tpu.visits import of_tiles, own_rows
from kernels.precision import precision


def loop(count: int, body) -> None:
    """`body(i)` for each i; without a loop if there is one, so that its i is known."""
    body(0) if count == 1 else lax.fori_loop(0, count, lambda i, _: body(i), None)


def paired(several: tuple, others: tuple) -> list[tuple]:
    """One of each, in pairs: a single one of either goes with all of the other."""
    count = max(len(several), len(others))
    return list(zip(*(group * (count // len(group)) for group in (several, others)), strict=True))


def products(
    xs: tuple[Array, ...],
    matrices: tuple[tuple[Array, ...], ...],
    group_sizes: Int[Array, " E"],
    turned: bool,
    combine: Callable[..., tuple[Array, ...]],
    outputs: int,
    tiles: Tiles,
    memory: int,
    interpret: bool = False,
) -> list[Float[Array, "M F"]]:
    """`combine` of the products x[m] @ w[group of m] in float32: `outputs` of x's type, 0 behind the last group.

    Args:
        xs: rows for each of the matrices, or the same for all.
        matrices: each one w (`turned`: E F D) and what it is multiplied by, if anything: factors with one of its two
            sides 1. Scaled, or of another type than x, a group's matrix is brought into x's type once, when its turn
            comes.
    """
    (rows, inner), dtype = xs[0].shape, xs[0].dtype
    values = matrices[0][0]
    width = values.shape[1] if turned else values.shape[2]
    visits = of_tiles(group_sizes, rows, tiles.rows)
    block = (tiles.columns, inner) if turned else (inner, tiles.columns)
    contract = ((1,), (1 if turned else 0,)), ((), ())
    widened = len(matrices[0]) > 1 or values.dtype != dtype
    at_once = 128 if block[0] % 128 == 0 else block[0]  # rows of a matrix that are widened: written out, too many

    def kernel(tile, group, ends, *refs):
        refs = iter(refs)
        x_refs = tuple(islice(refs, len(xs)))
        stored = [tuple(islice(refs, len(matrix))) for matrix in matrices]
        ys = tuple(islice(refs, outputs))
        step = pl.program_id(1)
        previous = jnp.maximum(step - 1, 0)
        low, high = own_rows(tile, group, ends, step, tiles.rows)

        @pl.when((step == 0) | (tile[previous] != tile[step]))
        def _():
            for y in ys:
                y[...] = jnp.zeros_like(y)

        ready = tuple(refs) if widened else tuple(w for w, *_ in stored)
        if widened:

            def widen(i):
                some = pl.ds(i * at_once, at_once)
                for matrix, (w, *factors) in zip(ready, stored, strict=True):
                    wide = w[some].astype(jnp.float32)
                    for factor in factors:
                        wide = wide * (factor[...] if len(factor) == 1 else factor[some])
                    matrix[some] = wide.astype(matrix.dtype)

            @pl.when((step == 0) | (group[previous] != group[step]))
            def _():
                loop(block[0] // at_once, widen)

        def product(first, size):
            """Of `size` rows from `first`, or from earlier where the tile ends: those are computed once more."""
            first = pl.multiple_of(jnp.minimum(first, tiles.rows - size), ALIGNMENT)
            at = pl.ds(first, size)

            def some_columns(n):
                columns = pl.ds(n * tiles.part, tiles.part)
                found = combine(
                    *(
                        lax.dot_general(
                            x[at],
                            matrix[columns, :] if turned else matrix[:, columns],
                            contract,
                            precision=precision(dtype),
                            preferred_element_type=jnp.float32,
                        )
                        for x, matrix in paired(x_refs, ready)
                    )
                )
                row = first + lax.broadcasted_iota(jnp.int32, (size, tiles.part), 0)
                mine = (row >= low) & (row < high)
                for y, new in zip(ys, found, strict=True):
                    y[at, columns] = jnp.where(mine, new, y[at, columns].astype(jnp.float32)).astype(dtype)

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

    def of_group(array):
        """Blocks of the group's matrix, or of its factors, which are 1 wide on one side."""
        sides = [1 if size == 1 else side for size, side in zip(array.shape[1:], block, strict=True)]

        def index(n, i, tile, group, ends):
            place = (n, 0) if turned else (0, n)
            return group[i], *(0 if size == 1 else at for size, at in zip(array.shape[1:], place, strict=True))

        return pl.BlockSpec((None, *sides), index)

    arrays = [array for matrix in matrices for array in matrix]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(-(-width // tiles.columns), visits.count),
        in_specs=[
            *(pl.BlockSpec((tiles.rows, inner), lambda n, i, tile, group, ends: (tile[i], 0)) for _ in xs),
            *map(of_group, arrays),
        ],
        out_specs=[pl.BlockSpec((tiles.rows, tiles.columns), lambda n, i, tile, group, ends: (tile[i], n))] * outputs,
        scratch_shapes=[pltpu.VMEM(block, dtype) for _ in matrices] if widened else [],
    )
    read = sum(array.size * array.dtype.itemsize for array in (*xs, *arrays))
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct((rows, width), dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * width * len(matrices),
            bytes_accessed=read + rows * width * dtype.itemsize * outputs,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(visits.tile, visits.group, visits.ends, *xs, *arrays)
