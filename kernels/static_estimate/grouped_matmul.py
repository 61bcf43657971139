"""How often the parts of our grouped products run: from the tiles and the visits that they themselves plan."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.grouped_matmul.tpu import tiles, visits
from kernels.static_estimate.compiler import Kernel
from kernels.static_estimate.estimate import Geometry, grid_step


class Passes(NamedTuple):
    """For each visit of a tile by a group (int `V`): passes over `product` of its rows, and what is special.

    special: of the product of rows, 1 where fewer than a whole pass are left and take half of one; of the gradient of
    the matrices, how many of the passes meet rows of another group.
    """

    passes: np.ndarray
    special: np.ndarray


def of_products(low, high, plan: tiles.Tiles) -> Passes:
    """low, high: where the group's rows begin and end in the tile, int `V`."""
    length = np.maximum(high - low // tiles.ALIGNMENT * tiles.ALIGNMENT, 0)
    whole = (length + plan.product // 2 - 1) // plan.product
    return Passes(whole, (length > whole * plan.product).astype(int))


def of_outer(low, high, plan: tiles.Tiles) -> Passes:
    """As `of_products`."""
    begin = low // tiles.ALIGNMENT * tiles.ALIGNMENT
    passes = -(-np.maximum(high - begin, 0) // plan.product)
    wanted = begin[:, None] + np.arange(max(passes.max(), 1)) * plan.product
    first = np.minimum(wanted, plan.rows - plan.product)
    cut = (np.maximum(wanted, low[:, None]) != first) | (first + plan.product > high[:, None])
    return Passes(passes, (cut & (np.arange(cut.shape[1]) < passes[:, None])).sum(axis=1))


def grouped_matmul_geometry(kernel: Kernel, x, w, group_sizes: np.ndarray, gradient: bool) -> Geometry:
    """Of a kernel that `kernels.grouped_matmul(x, w, group_sizes)`, not transposed, or its gradient compiles to.

    x: M D, w: E D F, of which shapes and types are enough; group_sizes: int `E`, whose numbers count. gradient: of the
    two that multiply rows, the one of x's gradient. To be called within `target()`.

    Raises ValueError: the kernel was compiled in other blocks than its plan says.
    """
    (rows, inner), (groups, _, width) = x.shape, w.shape
    inner, width = (width, inner) if gradient else (inner, width)
    sums = kernel.name == "grouped_matmul_outer"
    choose, visit = (tiles.for_outer, visits.of_groups) if sums else (tiles.for_products, visits.of_tiles)
    plan = choose(rows, inner, width, groups, x.dtype.itemsize, w.dtype.itemsize, tiles.this_chip())
    matrix = (1, plan.columns, plan.inner) if gradient else (1, plan.inner, plan.columns)
    planned = (plan.rows, plan.inner), (plan.rows, plan.columns) if sums else matrix
    if kernel.blocks[:2] != planned:
        raise ValueError(f"{kernel.name} reads blocks {kernel.blocks[:2]}, its plan says {planned}")

    count, tile, group, ends = visit(jnp.asarray(group_sizes, jnp.int32), rows, plan.rows)
    steps = np.arange(int(count))
    low, high = (np.asarray(x) for x in visits.own_rows(tile, group, ends, steps, plan.rows))
    passes, special = of_outer(low, high, plan) if sums else of_products(low, high, plan)
    left, right = -(-inner // plan.inner), -(-width // plan.columns)  # parts of the matrices, each with all visits
    # Some chips' compiler asks first whether the loop over passes runs at all.
    asks = len(grid_step(kernel.bundles).bodies) > (0 if sums else 1)
    entered = int((passes > 0).sum())
    loops = (plan.inner if sums else plan.columns) // plan.part
    common = dict(
        steps=left * right * len(steps),
        trips=(passes.sum() / max(entered if asks else len(steps), 1), *((loops, loops) if loops > 1 else ())),
        hbm_bytes=rows * (inner * right + width * left) * x.dtype.itemsize + w.size * w.dtype.itemsize,
    )
    bodies = (left * right * entered,) if asks else ()
    if sums:
        share = special.sum() / max(passes.sum(), 1)
        return Geometry(bodies, rows=(left * right * groups,), shares=(1 - share, share), **common)
    opened = len(np.unique(np.asarray(tile)[: len(steps)]))
    return Geometry((*bodies, right * int(special.sum())), rows=(right * opened,), **common)
