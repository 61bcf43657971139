"""Which tile of rows meets which group, in the order of the rows: computed on the device, as group sizes are."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Visits(NamedTuple):
    """One step of a kernel for each pair of a tile and a group with rows in it; V is the most that there can be."""

    count: Int[Array, ""]  # the steps that there are
    tile: Int[Array, " V"]
    group: Int[Array, " V"]
    ends: Int[Array, " G"]  # row behind each group; group g begins at ends[g - 1], the first one at 0


def of_tiles(group_sizes: Int[Array, " G"], rows: int, tile: int) -> Visits:
    """Every tile is visited; one behind the last group by the last group with rows, which has none in it."""
    return _visits(group_sizes, rows, tile, of_empty=0)


def of_groups(group_sizes: Int[Array, " G"], rows: int, tile: int) -> Visits:
    """Every group is visited, one without rows once; tiles behind the last group are not."""
    return _visits(group_sizes, rows, tile, of_empty=1)


def own_rows(tile, group, ends, step, rows: int):
    """Where the rows of a step's group begin and end in its tile of `rows` rows: inside a kernel."""
    mine, top = group[step], tile[step] * rows
    start = jnp.where(mine > 0, ends[jnp.maximum(mine - 1, 0)], 0)
    return jnp.maximum(start - top, 0), jnp.minimum(ends[mine] - top, rows)


def _visits(group_sizes, rows: int, tile: int, of_empty: int) -> Visits:
    tiles, groups = -(-rows // tile), len(group_sizes)
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    first = jnp.minimum(starts // tile, tiles - 1)
    visits = jnp.where(ends > starts, (ends - 1) // tile - first + 1, of_empty)
    before = jnp.cumsum(visits)
    step = jnp.arange(tiles + groups - 1, dtype=jnp.int32)
    group = jnp.searchsorted(before, jnp.minimum(step, before[-1] - 1), side="right", method="compare_all")
    group = jnp.minimum(group, groups - 1).astype(jnp.int32)  # of no rows at all: any
    own = first[group] + step - (before - visits)[group]
    reached = -(-ends[-1] // tile)
    behind = reached + step - before[-1]
    count = before[-1] if of_empty else before[-1] + tiles - reached
    return Visits(count, jnp.minimum(jnp.where(step < before[-1], own, behind), tiles - 1), group, ends)
