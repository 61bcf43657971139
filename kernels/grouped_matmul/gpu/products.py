"""Rows times their group's matrix: each tile of the result is one warp-specialised product of a block of threads."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.grouped_matmul.gpu import ring, windows
from kernels.grouped_matmul.gpu.ring import CONSUMERS, DEPTH, HEIGHT, STRIP


@partial(jax.jit, static_argnames=("turned", "blocks", "interpret"))
def products(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    turned: bool,
    blocks: int,
    interpret=None,
) -> Float[Array, "M F"]:
    """x[m] @ w[group of m] in x's type, 0 behind the last group; `turned`: w is E F D.

    D and F are multiples of 64. `blocks`: of threads, one for each multiprocessor.
    """
    given, x = len(x), windows.aligned(x)
    (rows, inner), width = x.shape, w.shape[1 if turned else 2]
    tile = ring.tile_width(width)
    across, depth = pl.cdiv(width, tile), inner // DEPTH

    def body(
        count_ref, group_ref, top_ref, first_ref, end_ref, x_ref, w_ref, y_ref, lefts, rights, full, free, strips, plain
    ):
        warpgroup = lax.axis_index("warpgroup")

        def place(index):
            """The window of rows, its first column of the result, and the steps of the sum."""
            window = lax.div(index, across)
            steps = jnp.where(group_ref[window] < len(w), depth, 0)
            return window, lax.rem(index, across) * tile, steps

        def load(index, done):
            window, column, steps = place(index)
            top, group = pl.multiple_of(top_ref[window], windows.ALIGNMENT), group_ref[window]

            def copies(step):
                columns, part = pl.ds(column, tile), pl.ds(step * DEPTH, DEPTH)
                right = w_ref.at[group, columns, part] if turned else w_ref.at[group, part, columns]
                return [x_ref.at[pl.ds(top + i * HEIGHT, HEIGHT), part] for i in range(CONSUMERS)], right

            return ring.fill(copies, steps, done, lefts, rights, full, free)

        def multiply(index, done):
            window, column, steps = place(index)

            def operands(step, slot):
                right = rights.at[slot]
                return lefts.at[slot, warpgroup], right.transpose((1, 0)) if turned else right

            found = ring.accumulated(operands, steps, done, full, free, tile, x.dtype)
            top = top_ref[window] + warpgroup * HEIGHT
            first = jnp.maximum(first_ref[window] - top, 0)
            end = jnp.minimum(end_ref[window] - top, HEIGHT)
            size = end - first

            @pl.when(size == HEIGHT)
            def _():
                ring.store(found, y_ref, top, column, strips)

            @pl.when((size > 0) & (size < HEIGHT))
            def _():
                ring.store_rows(found, y_ref, top, first, end, column, plain)

            return done + steps

        ring.run_tiles(count_ref[0] * across, blocks, load, multiply, free)

    run = ring.kernel(
        body,
        jax.ShapeDtypeStruct((rows, width), x.dtype),
        right=(tile, DEPTH) if turned else (DEPTH, tile),
        scratch=[plgpu.SMEM((CONSUMERS, HEIGHT, STRIP), x.dtype)],
        blocks=blocks,
        interpret=interpret,
    )
    return run(*windows.of_groups(group_sizes, rows), x, w)[:given]
