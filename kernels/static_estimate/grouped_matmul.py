"""How often the parts of our grouped products run: from the tiles and the visits that they themselves plan."""

from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.static_estimate.compiler import Kernel
from kernels.static_estimate.estimate import Geometry, grid_step


class Passes(NamedTuple):
    """For each visit of a tile by a group (int `V`): passes over `product` of its rows, and what is special.

    special: of the product of rows, 1 where fewer than a whole pass are left and take half of one; of the gradient of
    the matrices, how many of the passes meet rows of another group.
    """

    passes: np.ndarray
    special: np.ndarray


def of_products(low, high, product: int) -> Passes:
    """low, high: where the group's rows begin and end in the tile, int `V`."""
    from kernels.grouped_matmul.tpu.tiles import ALIGNMENT

    length = np.maximum(high - low // ALIGNMENT * ALIGNMENT, 0)
    whole = (length + product // 2 - 1) // product
    return Passes(whole, (length > whole * product).astype(int))


def of_outer(low, high, rows: int, product: int) -> Passes:
    """As `of_products`; rows: of the tile."""
    from kernels.grouped_matmul.tpu.tiles import ALIGNMENT

    begin = low // ALIGNMENT * ALIGNMENT
    passes = -(-np.maximum(high - begin, 0) // product)
    wanted = begin[:, None] + np.arange(max(passes.max(), 1)) * product
    first = np.minimum(wanted, rows - product)
    cut = (np.maximum(wanted, low[:, None]) != first) | (first + product > high[:, None])
    return Passes(passes, (cut & (np.arange(cut.shape[1]) < passes[:, None])).sum(axis=1))


def grouped_matmul_geometry(kernel: Kernel, x, w, group_sizes: np.ndarray, gradient: bool) -> Geometry:
    """Of a kernel that `kernels.grouped_matmul(x, w, group_sizes)`, not transposed, or its gradient compiles to.

    x: M D, w: E D F, of which shapes and types are enough; group_sizes: int `E`, whose numbers count. gradient: of the
    two that multiply rows, the one of x's gradient. To be called within `target()`.

    Raises ValueError: the kernel was compiled in other blocks than its plan says.
    """
    from kernels.grouped_matmul.tpu import tiles, visits

    (rows, inner), (groups, _, width) = x.shape, w.shape
    sizes = groups, x.dtype.itemsize, w.dtype.itemsize, tiles.this_chip()
    counts = jnp.asarray(group_sizes, jnp.int32)
    outer = kernel.name == "grouped_matmul_outer"
    if outer:
        plan = tiles.for_outer(rows, inner, width, *sizes)
        visited = visits.of_groups(counts, rows, plan.rows)
        planned = (plan.rows, plan.inner), (plan.rows, plan.columns)
        parts = -(-inner // plan.inner), -(-width // plan.columns)
    else:
        inner, width = (width, inner) if gradient else (inner, width)
        plan = tiles.for_products(rows, inner, width, *sizes)
        visited = visits.of_tiles(counts, rows, plan.rows)
        block = (plan.columns, plan.inner) if gradient else (plan.inner, plan.columns)
        planned = (plan.rows, plan.inner), (1, *block)
        parts = 1, -(-width // plan.columns)
    if kernel.blocks[:2] != planned:
        raise ValueError(f"{kernel.name} reads blocks {kernel.blocks[:2]}, its plan says {planned}")
    steps = np.arange(int(visited.count))
    low, high = (np.asarray(x) for x in visits.own_rows(visited.tile, visited.group, visited.ends, steps, plan.rows))
    read = rows * (inner * parts[1] + (width * parts[0] if outer else 0)) * x.dtype.itemsize
    written = 0 if outer else rows * width * x.dtype.itemsize
    moved = read + written + w.size * w.dtype.itemsize
    passed = of_outer(low, high, plan.rows, plan.product) if outer else of_products(low, high, plan.product)
    entered, special = int((passed.passes > 0).sum()), int(passed.special.sum())
    # Some chips' compiler asks first whether the loop over passes runs at all.
    asks = len(grid_step(kernel.bundles).bodies) > (0 if outer else 1)
    times, trips = prod(parts), passed.passes.sum() / max(entered if asks else len(steps), 1)
    bodies = (times * entered,) if asks else ()
    written_out = (plan.inner if outer else plan.columns) // plan.part
    inside = () if written_out == 1 else (written_out, written_out)
    common = dict(steps=times * len(steps), trips=(trips, *inside), hbm_bytes=moved)
    if outer:
        share = special / max(passed.passes.sum(), 1)
        return Geometry(bodies, rows=(times * groups,), shares=(1 - share, share), **common)
    opened = len(np.unique(np.asarray(visited.tile)[: len(steps)]))
    return Geometry((*bodies, times * special), rows=(times * opened,), **common)
