"""The windows of rows that a product is made of: computed on the device, as group sizes are."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

ROWS = 128
ALIGNMENT = 8  # of a window's first row: the copy engine moves swizzled tiles of 8 rows


class Windows(NamedTuple):
    """`ROWS` rows from `top` on, of which first..end are one group's, or no group's and those behind the last one."""

    count: Int[Array, " 1"]
    group: Int[Array, " W"]  # E: behind the last group
    top: Int[Array, " W"]
    first: Int[Array, " W"]
    end: Int[Array, " W"]


def aligned(x: Array) -> Array:
    """With rows of zeros up to a whole number of tiles: nearly always there are none to add."""
    return jnp.pad(x, ((0, -len(x) % ALIGNMENT), (0, 0)))


def bounds(group_sizes: Int[Array, " E"], rows: int) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Each group's first row and the one behind its last."""
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def of_groups(group_sizes: Int[Array, " E"], rows: int) -> Windows:
    """Each group's rows, and those behind the last, in windows that begin with them: each row is in one of them."""
    groups = len(group_sizes)
    starts, ends = bounds(jnp.append(group_sizes, rows), rows)
    tops = starts // ALIGNMENT * ALIGNMENT
    own = jnp.where(ends > starts, -((tops - ends) // ROWS), 0)
    before = jnp.cumsum(own)
    most = (rows + (groups + 1) * (ROWS + ALIGNMENT - 2)) // ROWS
    window = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(before, window, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, groups)  # of windows behind `count`: any
    top = tops[group] + (window - (before - own)[group]) * ROWS
    return Windows(before[-1:], group, top, jnp.maximum(starts[group], top), jnp.minimum(ends[group], top + ROWS))
