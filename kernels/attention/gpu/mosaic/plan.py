"""What the kernels know of a mask: a few numbers for each query and key, and which blocks of the plane they visit.

A query sees the keys in [low, high) and those before `prefix`, with `block_ids` those of its own block too, and of all
these, with segments, only those of its own segment. `causal`, windows, offsets and lengths are in low, high and prefix.
Where the mask holds no array all of this is numpy, known when the kernel is compiled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.mask import Mask

BLOCK = 128  # queries, or keys, that a block of threads owns
# Ids that nobody has, so that equality is all that is left to ask; a query's and a key's differ.
NO_QUERY, NO_KEY = np.iinfo(np.int32).min, np.iinfo(np.int32).min + 1


class Seen(NamedTuple):
    """Which numbers there are; `high` is always there."""

    low: bool
    prefix: bool
    blocks: bool
    segments: bool


class Numbers(NamedTuple):
    """queries: int32 `R n T`, n of high, low, prefix, block id, segment id; keys: int32 `R m S`, m of the two ids, or
    None where there are none. R is 1, where all rows of the batch are alike, or B.
    """

    seen: Seen
    queries: jax.Array | np.ndarray
    keys: jax.Array | np.ndarray | None


class Visits(NamedTuple):
    """table: int32 `R a b`, for each of a blocks of one side the visited blocks of the other, those that need no mask
    first; counts: int32 `R a 2`, of these how many need none, and how many there are.
    """

    table: jax.Array | np.ndarray
    counts: jax.Array | np.ndarray


def numbers(mask: Mask, num_queries: int, num_keys: int, padded_queries: int, padded_keys: int) -> Numbers:
    """The numbers of all queries and keys. Queries that pad see what the last one sees, and keys that pad no one."""
    xp = jnp if jax.tree.leaves(mask) else np
    blocks = mask.causal and mask.block_ids is not None
    segments = mask.q_segment_ids is not None
    prefix = mask.causal and mask.prefix_length is not None
    seen = Seen(mask.window is not None, prefix and mask.window is not None, blocks, segments)
    length = xp.minimum(_per_row(num_keys if mask.kv_length is None else mask.kv_length, xp), num_keys)
    place = np.arange(num_queries)[None]
    high, low = xp.broadcast_to(length, (length.shape[0], num_queries)), xp.zeros((1, 1), np.int32)
    if mask.causal:
        last = place + _per_row(mask.q_offset, xp)
        low = last + 1 - (mask.window or 0)
        high = xp.minimum(high, last + 1)
        before = xp.minimum(_per_row(mask.prefix_length, xp), length) if prefix else None
        if prefix and not seen.prefix:
            high = xp.maximum(high, before)
    of_queries, of_keys = [high], []
    if seen.low:
        of_queries.append(low)
    if seen.prefix:
        of_queries.append(before)
    there = np.arange(num_keys)[None] < length
    pairs = [(mask.block_ids, mask.block_ids)] * blocks + [(mask.q_segment_ids, mask.key_segments)] * segments
    for q_ids, k_ids in pairs:
        of_queries.append(jnp.where(jnp.asarray(q_ids) == 0, NO_QUERY, q_ids))
        of_keys.append(jnp.where((jnp.asarray(k_ids) == 0) | ~there, NO_KEY, k_ids))

    def together(arrays, size, padded, **how):
        rows = max(x.shape[0] for x in arrays)
        stacked = xp.stack([xp.broadcast_to(x, (rows, size)) for x in arrays], axis=1).astype(np.int32)
        return xp.pad(stacked, ((0, 0), (0, 0), (0, padded - size)), **how)

    queries = together(of_queries, num_queries, padded_queries, mode="edge")
    keys = together(of_keys, num_keys, padded_keys, constant_values=NO_KEY) if of_keys else None
    rows = max(len(queries), 1 if keys is None else len(keys))  # one may be alike for all rows, the other not
    queries, keys = (None if x is None else xp.broadcast_to(x, (rows, *x.shape[1:])) for x in (queries, keys))
    return Numbers(seen, queries, keys)


def _per_row(value, xp):
    return xp.reshape(xp.asarray(value), (-1, 1))


def of_queries(found: Numbers, num_keys: int, block_keys: int) -> Visits:
    """The blocks of keys that each BLOCK of queries visits; `num_keys` is a multiple of theirs.

    No pair that is seen is missed, and no block that is said to need no mask holds a hidden one; ids that are not
    sorted may make blocks visited, or masked, that need not be.
    """
    return _listed(*_judge(found, num_keys, BLOCK, block_keys))


def of_keys(found: Numbers, num_keys: int, block_queries: int) -> Visits:
    """The blocks of queries that each BLOCK of keys visits."""
    return _listed(*(x.swapaxes(1, 2) for x in _judge(found, num_keys, block_queries, BLOCK)))


def _judge(found: Numbers, num_keys: int, block_queries: int, block_keys: int):
    """Bool `R nq nk` twice: whether a pair of the block may be seen, and whether all are."""
    seen, queries, keys = found
    xp = np if isinstance(queries, np.ndarray) else jnp
    start = np.arange(0, num_keys, block_keys)
    stop = start + block_keys
    parts = queries.reshape(*queries.shape[:2], -1, block_queries)
    lowest, highest = parts.min(axis=3)[..., None], parts.max(axis=3)[..., None]
    live, full = highest[:, 0] > start, lowest[:, 0] >= stop
    at = 1
    if seen.low:
        live, full = live & (lowest[:, at] < stop), full & (highest[:, at] <= start)
        at += 1
    if seen.prefix:
        live, full = live | (highest[:, at] > start), full | (lowest[:, at] >= stop)
        at += 1
    for i in range(seen.blocks + seen.segments):
        q_low, q_high, q_one = _range(queries[:, at + i], block_queries, NO_QUERY, xp)
        k_low, k_high, k_one = (x.swapaxes(1, 2) for x in _range(keys[:, i], block_keys, NO_KEY, xp))
        meet, same = (q_low <= k_high) & (k_low <= q_high), q_one & k_one & (q_low == k_low)
        live, full = (live | meet, full | same) if seen.blocks and i == 0 else (live & meet, full & same)
    return live, full & live


def _range(ids, size: int, nobody: int, xp):
    """`R blocks 1` thrice: the lowest and highest id of a block that somebody has, and whether it is the only one."""
    ids = ids.reshape(ids.shape[0], -1, size)
    low = xp.where(ids == nobody, np.iinfo(np.int32).max, ids).min(axis=2, keepdims=True)
    high = ids.max(axis=2, keepdims=True)
    return low, high, (low == high) & (ids != nobody).all(axis=2, keepdims=True)


def _listed(live, full) -> Visits:
    xp = np if isinstance(live, np.ndarray) else jnp
    order = xp.where(full, 0, xp.where(live, 1, 2))
    table = xp.argsort(order, axis=2, stable=True)
    counts = xp.stack([full.sum(axis=2), live.sum(axis=2)], axis=2)
    return Visits(table.astype(np.int32), counts.astype(np.int32))
