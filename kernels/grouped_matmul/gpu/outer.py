"""The gradient of each group's matrix: its rows of one operand, transposed, times those of the other."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.grouped_matmul.gpu import ring, windows
from kernels.grouped_matmul.gpu.ring import CONSUMERS, DEPTH, HEIGHT, STRIP
from kernels.grouped_matmul.gpu.windows import ALIGNMENT


@partial(jax.jit, static_argnames=("blocks", "interpret"))
def outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    group_sizes: Int[Array, " E"],
    blocks: int,
    interpret=None,
) -> Float[Array, "E A B"]:
    """Sum over the rows of each group of a[m] b[m]^T in a's type; exactly 0 for a group without rows.

    A and B are multiples of 64. `blocks`: of threads, one for each multiprocessor.
    """
    a, b = windows.aligned(a), windows.aligned(b)
    (rows, height), width, groups = a.shape, b.shape[1], len(group_sizes)
    tile = ring.tile_width(width)
    across, down = pl.cdiv(width, tile), pl.cdiv(height, CONSUMERS * HEIGHT)

    def body(first_ref, end_ref, a_ref, b_ref, out_ref, lefts, rights, full, free, strips, cleared):
        warpgroup = lax.axis_index("warpgroup")

        def place(index):
            """The group, where the tile begins in its matrix, the first row that is read, the steps of the sum."""
            group, inside = lax.div(index, down * across), lax.rem(index, down * across)
            row, column = lax.div(inside, across) * CONSUMERS * HEIGHT, lax.rem(inside, across) * tile
            top = first_ref[group] // ALIGNMENT * ALIGNMENT
            steps = jnp.where(end_ref[group] > first_ref[group], pl.cdiv(end_ref[group] - top, DEPTH), 0)
            return group, row, column, top, steps

        def load(index, done):
            _, row, column, top, steps = place(index)

            def copies(step):
                own = pl.ds(pl.multiple_of(top + step * DEPTH, ALIGNMENT), DEPTH)
                parts = [a_ref.at[own, pl.ds(row + i * HEIGHT, HEIGHT)] for i in range(CONSUMERS)]
                return parts, b_ref.at[own, pl.ds(column, tile)]

            return ring.fill(copies, steps, done, lefts, rights, full, free)

        def clear(ref, own):
            ref[...] = jnp.where(own, plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA), jnp.zeros((), a.dtype))

        def multiply(index, done):
            group, row, column, top, steps = place(index)
            first, end = first_ref[group], end_ref[group]

            def operands(step, slot):
                """With the rows of others cleared in both: what stands there may be anything, also NaN."""
                above = top + step * DEPTH

                @pl.when((above < first) | (above + DEPTH > end))
                def _():
                    rows = above + plgpu.broadcasted_iota(jnp.int32, (DEPTH, STRIP), 0, layout=plgpu.Layout.WGMMA)
                    own = (rows >= first) & (rows < end)
                    clear(lefts.at[slot, warpgroup], own)
                    for strip in range(tile // STRIP):

                        @pl.when(warpgroup == strip % CONSUMERS)
                        def _(strip=strip):
                            clear(rights.at[slot, :, pl.ds(strip * STRIP, STRIP)], own)

                    plgpu.commit_smem()
                    plgpu.barrier_arrive(cleared)
                    plgpu.barrier_wait(cleared)

                return lefts.at[slot, warpgroup].transpose((1, 0)), rights.at[slot]

            found = ring.accumulated(operands, steps, done, full, free, tile, a.dtype)
            mine = row + warpgroup * HEIGHT

            @pl.when(mine < height)
            def _():
                ring.store(found, out_ref.at[group], mine, column, strips)

            return done + steps

        ring.run_tiles(groups * down * across, blocks, load, multiply, free)

    run = ring.kernel(
        body,
        jax.ShapeDtypeStruct((groups, height, width), a.dtype),
        right=(DEPTH, tile),
        scratch=[plgpu.Barrier(num_arrivals=CONSUMERS)],
        blocks=blocks,
        interpret=interpret,
    )
    return run(*windows.bounds(group_sizes, rows), a, b)
