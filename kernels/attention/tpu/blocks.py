"""Which blocks of the query-key plane a kernel visits: a list in the order of the visits, made from the mask.

What the mask says at trace time (orders, windows, int lengths) makes a list of candidates in numpy. Where arrays take
part (segment ids, lengths per row) the device judges the candidates of each row, and the dead ones leave the list.

An entry is an int32: query block << 16 | key block << 4 | last << 3 | first << 2 | kind; `first` and `last` mark the
visits of one query block. Each query block is visited at least once, if only to write zeros.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.mask import Mask

# Kinds of visits. On the diagonal a block is cut by `causal` from corner to corner, and nothing before it is hidden.
NOTHING, PART, FULL, DIAGONAL = range(4)
FIRST, LAST = 4, 8
FAR = 2**30  # beyond any position
MAX_ENTRIES = 96 * 1024  # of 1 MiB of scalar memory


class Blocks(NamedTuple):
    """table: int32 `1 P` (all rows alike) or `B P`; visits: how many of P are live, in the longest row, an int or a
    traced scalar; kinds: those that can occur; density: visited part of the plane, at most.
    """

    table: jax.Array | np.ndarray
    visits: jax.Array | int
    kinds: frozenset[int]
    density: float


class Extent(NamedTuple):
    """Real lengths, and the sizes of blocks: what divides the plane. Keys are [first_key, num_keys)."""

    num_queries: int
    num_keys: int
    block_queries: int
    block_keys: int
    first_key: int = 0

    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.arange(0, self.num_queries, self.block_queries),
            np.arange(self.first_key, self.num_keys, self.block_keys),
        )


def plan(mask: Mask, extent: Extent) -> Blocks:
    """The visits, query block by query block, keys ascending. `kv_length` is taken to be in the mask where keys pad."""
    found = plans(mask, [extent])
    visits = found.visits[0]
    return found._replace(table=found.table[0], visits=int(visits) if isinstance(visits, np.integer) else visits)


def plans(mask: Mask, pieces: list[Extent]) -> Blocks:
    """The plan of each piece of one plane, to be scanned over: one axis more in front of `table`, an array `visits`.

    Key blocks are counted from a piece's own first key. Lists of different length end as those of rows do.
    """
    known = _known(mask)
    xp = np if known is mask else jnp
    kinds, density, lists = set(), 0.0, []
    for piece in pieces:
        live, full, diagonal = _judge(known, piece, np)
        empty = ~live.any(axis=(0, 2))
        queries, keys = np.nonzero(live[0] | (empty[:, None] & (np.arange(live.shape[2]) == 0)))
        density += live.mean() / len(pieces)
        if known is not mask:
            live, full, _ = _judge(mask, piece, jnp)
        kind = xp.where(live, xp.where(full, FULL, np.where(diagonal, DIAGONAL, PART)), NOTHING)[:, queries, keys]
        # A query block without live keys keeps its first candidate.
        opens = np.r_[True, queries[1:] != queries[:-1]]
        stays = (kind != NOTHING) | (opens & ~live.any(axis=2)[:, queries])
        lists.append((queries, keys, kind, stays))
        if known is mask:
            kinds |= set(np.unique(kind).tolist())
        else:
            kinds |= {NOTHING, PART, FULL} | ({DIAGONAL} if diagonal.any() else set())
    most = max(len(queries) for queries, *_ in lists)

    def stacked(values):
        rows = [xp.broadcast_to(x, (lists[0][2].shape[0], x.shape[-1])) for x in values]
        return xp.stack([xp.pad(x, ((0, 0), (0, most - x.shape[1]))) for x in rows])

    queries, keys, kind, stays = map(stacked, zip(*lists, strict=True))
    count = stays.sum(axis=2, keepdims=True)
    # Behind its end a row repeats the last entry's blocks, so that nothing is fetched, and does nothing.
    index = xp.arange(most)
    order = xp.take_along_axis(xp.argsort(~stays, axis=2, stable=True), xp.minimum(index, count - 1), axis=2)
    queries, keys, kind = (xp.take_along_axis(x, order, axis=2) for x in (queries, keys, kind))
    changes = queries[..., 1:] != queries[..., :-1]
    edge = xp.ones_like(stays[..., :1])
    first, last = xp.concatenate([edge, changes], axis=2), xp.concatenate([changes, edge], axis=2)
    marks = first * FIRST | (last | (index == count - 1)) * LAST | kind
    table = (queries << 16 | keys << 4 | xp.where(index < count, marks, 0)).astype(np.int32)
    return Blocks(table, count.max(axis=(1, 2)), frozenset(kinds), density)


def _known(mask: Mask) -> Mask:
    """`mask` without what is only known on the device: hides no more than it does. Itself, where all is known."""
    unknown = {"prefix_length", "kv_length", "q_offset"}
    unknown = {name for name in unknown if not isinstance(getattr(mask, name), int | None)}
    drop = {name: None for name in unknown - {"q_offset"}}
    if mask.block_ids is not None or unknown & {"prefix_length", "q_offset"}:
        drop |= {"causal": False, "window": None, "block_ids": None, "q_offset": 0}
    if mask.q_segment_ids is not None:
        drop |= {"q_segment_ids": None, "kv_segment_ids": None}
    return replace(mask, **drop) if drop else mask


def _judge(mask: Mask, extent: Extent, xp):
    """live, full: bool `R nq nk` with R = 1 or B (or `1 1 1`); diagonal: numpy bool `nq nk`.

    No live block is missed, no block called full holds a hidden pair; segments that are not sorted may make blocks
    live or partial that are dead or full.
    """
    q_start, k_start = extent.starts()
    diagonal = np.zeros((len(q_start), len(k_start)), bool)
    q_last = np.minimum(q_start + extent.block_queries, extent.num_queries)[:, None] - 1
    q_start, k_start, k_last = q_start[:, None], k_start[None], k_start[None] + extent.block_keys - 1
    live = full = xp.ones((1, 1, 1), bool)
    if mask.causal:
        offset = _scalar(mask.q_offset, xp)
        nearest, farthest = q_start + offset - k_last, q_last + offset - k_start
        live, full = farthest >= 0, nearest >= 0
        if mask.window is not None:
            live, full = live & (nearest < mask.window), full & (farthest < mask.window)
        if mask.prefix_length is not None:
            prefix = _scalar(mask.prefix_length, xp)
            live, full = live | (k_start < prefix), full | (k_last < prefix)
        if mask.block_ids is not None:
            meets, same = _same(mask.block_ids, mask.block_ids, extent, xp)
            live, full = live | meets, full | same
        if isinstance(mask.q_offset, int) and mask.block_ids is None and mask.prefix_length is None:
            diagonal = np.broadcast_to(q_start + mask.q_offset == k_start, diagonal.shape)
            diagonal = diagonal & (extent.block_queries == extent.block_keys <= (mask.window or FAR))
    if mask.q_segment_ids is not None:
        meets, same = _same(mask.q_segment_ids, mask.key_segments, extent, xp)
        live, full = live & meets, full & same
    if mask.kv_length is not None:
        length = _scalar(mask.kv_length, xp)
        live, full = live & (k_start < length), full & (k_last < length)
    shape = (-1, *diagonal.shape)
    return (
        xp.broadcast_to(live, live.shape[:1] + shape[1:]),
        xp.broadcast_to(full, full.shape[:1] + shape[1:]),
        diagonal,
    )


def _scalar(value, xp):
    return xp.reshape(xp.asarray(value), (-1, 1, 1))


def _same(q_ids, k_ids, extent: Extent, xp):
    """Whether a pair of equal, non-zero ids may be in a block, and whether all its pairs are that."""
    q_low, q_high, q_whole = _ranges(q_ids, extent.num_queries, extent.block_queries, 0)
    k_low, k_high, k_whole = _ranges(k_ids, extent.num_keys, extent.block_keys, extent.first_key)
    q_low, q_high, q_whole = (x[:, :, None] for x in (q_low, q_high, q_whole))
    k_low, k_high, k_whole = (x[:, None, :] for x in (k_low, k_high, k_whole))
    return (q_low <= k_high) & (k_low <= q_high), q_whole & k_whole & (q_low == k_low)


def _ranges(ids, length: int, size: int, start: int):
    """Lowest and highest non-zero id of each block, and whether all its ids are one such."""
    ids = jnp.asarray(ids)[:, start:length]
    ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size))).reshape(ids.shape[0], -1, size)
    low = jnp.where(ids == 0, jnp.iinfo(ids.dtype).max, ids).min(axis=2)
    high = jnp.where(ids == 0, jnp.iinfo(ids.dtype).min, ids).max(axis=2)
    return low, high, (low == high) & (ids != 0).all(axis=2)


def refusal(mask: Mask, rows: int, extent: Extent) -> str | None:
    """Why the list of visits is too long for the memory of scalars (1 MiB); None where it fits."""
    rows = 1 if _known(mask) is mask else rows
    num_queries, num_keys = map(len, extent.starts())
    if num_keys > 4096 or rows * num_queries * num_keys > MAX_ENTRIES:
        return (
            f"{rows} lists of {num_queries} x {num_keys} blocks are more than {MAX_ENTRIES} entries "
            "or 4096 key blocks; fewer rows at a time fit"
        )
    return None
