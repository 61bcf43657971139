"""What the kernels share: one warpgroup copies tiles into a ring of slots, two multiply what is there.

A block of threads makes tiles of `CONSUMERS * HEIGHT` rows and up to 256 columns, `DEPTH` of the sum in each step.
Every warpgroup runs through the same steps, and counts them: `done` are those of the tiles before.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HEIGHT = 64  # rows of one consumer's accumulator: one instruction's
DEPTH = 64  # 128 bytes: a swizzled row
CONSUMERS = 2
SLOTS = 4
STRIP = 64  # columns that are stored or cleared at a time
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def tile_width(width: int) -> int:
    return min(256, width)


def kernel(body, out_type, right: tuple[int, int], scratch: list, blocks: int, interpret):
    """`body(*inputs, output, lefts, rights, full, free, strips, *scratch)`, run by three warpgroups of each block."""
    dtype = out_type.dtype
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((SLOTS, CONSUMERS, HEIGHT, DEPTH), dtype, transforms=TILED),
            plgpu.SMEM((SLOTS, *right), dtype, transforms=TILED),
            plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
            plgpu.SMEM((CONSUMERS, HEIGHT, STRIP), dtype, transforms=TILED),
            *scratch,
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )


def run_tiles(count, blocks: int, load, multiply, free):
    """For each tile of a block `load(tile, done)` by the last warpgroup, `multiply(tile, done)` by the others.

    Both give what is done then. Blocks take tiles in turns, so that neighbours are made at the same time.
    """
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    own = pl.cdiv(jnp.maximum(count - block, 0), blocks)

    def each(run):
        return lax.fori_loop(0, own, lambda i, done: run(block + i * blocks, done), jnp.int32(0))

    # Registers of a thread: whoever only starts copies leaves them to the accumulators.
    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _drain(each(load), free)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        each(multiply)
        plgpu.wait_smem_to_gmem(0)


def fill(copies, steps, done, lefts, rights, full, free):
    """The producer's steps of a tile: `copies(step)` are the left operand's parts and the right one, in memory."""

    def one(step, done):
        slot = lax.rem(done, SLOTS)

        @pl.when(done >= SLOTS)
        def _():
            plgpu.barrier_wait(free.at[slot])

        parts, right = copies(step)
        for i, part in enumerate(parts):
            plgpu.copy_gmem_to_smem(part, lefts.at[slot, i], full.at[slot])
        plgpu.copy_gmem_to_smem(right, rights.at[slot], full.at[slot])
        return done + 1

    return lax.fori_loop(0, steps, one, done)


def _drain(done, free):
    """The producer stays until its slots are free: who leaves a barrier with arrivals unseen breaks it."""

    def one(step, _):
        plgpu.barrier_wait(free.at[lax.rem(step, SLOTS)])

    lax.fori_loop(jnp.maximum(done - SLOTS, 0), done, one, None)


def accumulated(operands, steps, done, full, free, width: int, dtype):
    """A consumer's tile: the products of `operands(step, slot)`, summed. A slot is left when the next step is begun."""

    def run(acc):
        def one(step, _):
            slot = lax.rem(done + step, SLOTS)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(acc, *operands(step, slot))
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(done + step - 1, SLOTS)])

        lax.fori_loop(0, steps, one, None)
        plgpu.wgmma_wait(0)

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_arrive(free.at[lax.rem(done + steps - 1, SLOTS)])

        return acc[...].astype(dtype)

    return pl.run_scoped(run, plgpu.ACC((HEIGHT, width), jnp.float32))


def store(found, out_ref, top, column, strips):
    """A consumer's tile goes to `out_ref`, where its first row has its place at `top`."""
    warpgroup = lax.axis_index("warpgroup")

    def one(strip, columns):
        strips[warpgroup] = strip
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(top, 8), HEIGHT)
        plgpu.copy_smem_to_gmem(strips.at[warpgroup], out_ref.at[rows, columns])

    _each_strip(found, column, out_ref.shape[1], one)


def store_rows(found, out_ref, top, first, end, column, plain):
    """As `store`, but only rows first..end, which are not all.

    The copy engine moves a number of rows that is known beforehand: powers of two make up any. In its swizzled tiles
    rows come by eights, so these strips are `plain`.
    """
    warpgroup = lax.axis_index("warpgroup")

    def one(strip, columns):
        plain[warpgroup] = strip
        plgpu.commit_smem()
        row = first
        for power in (32, 16, 8, 4, 2, 1):
            piece = (end - first) & power

            @pl.when(piece > 0)
            def _(row=row, power=power):
                source = plain.at[warpgroup, pl.ds(row, power)]
                plgpu.copy_smem_to_gmem(source, out_ref.at[pl.ds(top + row, power), columns])

            row += piece

    _each_strip(found, column, out_ref.shape[1], one)


def _each_strip(found, column, width, one):
    for offset in range(0, found.shape[1], STRIP):

        @pl.when(column + offset < width)
        def _(offset=offset):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the strip before
            one(found[:, offset : offset + STRIP], pl.ds(column + offset, STRIP))
