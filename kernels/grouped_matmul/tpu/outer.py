"""The gradient of the matrices: a product over each group's rows, for TPUs."""

from itertools import islice

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.grouped_matmul.tpu.products import loop, paired
from kernels.grouped_matmul.tpu.tiles import ALIGNMENT, Tiles
from kernels.grouped_matmul.tpu.visits import of_groups, own_rows
from kernels.precision import precision

SUM_OF_ROWS = ((0,), (0,)), ((), ())


def outer(
    lefts: tuple[Array, ...],
    rights: tuple[Array, ...],
    group_sizes: Int[Array, " E"],
    dtype: jnp.dtype,
    tiles: Tiles,
    memory: int,
    interpret: bool = False,
) -> list[Float[Array, "E A B"]]:
    """Sums over the rows of each group of a[m] b[m]^T, in float32; 0 for a group without rows.

    One for each pair: either side may be one array that goes with all of the other.
    """
    (rows, left), right, groups = lefts[0].shape, rights[0].shape[1], len(group_sizes)
    count, row_type = max(len(lefts), len(rights)), lefts[0].dtype
    visits = of_groups(group_sizes, rows, tiles.rows)

    def kernel(tile, group, ends, *refs):
        refs = iter(refs)
        a_refs, b_refs, outs, totals = (tuple(islice(refs, n)) for n in (len(lefts), len(rights), count, count))
        step, last = pl.program_id(2), pl.num_programs(2) - 1
        low, high = own_rows(tile, group, ends, step, tiles.rows)

        @pl.when((step == 0) | (group[jnp.maximum(step - 1, 0)] != group[step]))
        def _():
            for total in totals:
                total[...] = jnp.zeros_like(total)

        def product(at, clean):
            columns = tuple(clean(b[at]) for b in b_refs)

            def some_of_left(n):
                some = pl.ds(n * tiles.part, tiles.part)
                pairs = paired(tuple(clean(a[at, some]) for a in a_refs), columns)
                for total, (a, b) in zip(totals, pairs, strict=True):
                    total[some] += lax.dot_general(
                        a, b, SUM_OF_ROWS, precision=precision(row_type), preferred_element_type=jnp.float32
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
            for out, total in zip(outs, totals, strict=True):
                out[...] = total[...].astype(out.dtype)

    block = tiles.inner, tiles.columns

    def of_rows(width, side):
        return pl.BlockSpec((tiles.rows, width), lambda m, n, i, tile, group, ends: (tile[i], (m, n)[side]))

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(-(-left // tiles.inner), -(-right // tiles.columns), visits.count),
        in_specs=[of_rows(tiles.inner, 0)] * len(lefts) + [of_rows(tiles.columns, 1)] * len(rights),
        out_specs=[pl.BlockSpec((None, *block), lambda m, n, i, tile, group, ends: (group[i], m, n))] * count,
        scratch_shapes=[pltpu.VMEM(block, jnp.float32)] * count,
    )
    read = sum(array.size for array in (*lefts, *rights)) * row_type.itemsize
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct((groups, left, right), dtype)] * count,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * left * right * count,
            bytes_accessed=read + groups * left * right * jnp.dtype(dtype).itemsize * count,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul_outer",
    )(visits.tile, visits.group, visits.ends, *lefts, *rights)
