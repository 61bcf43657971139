"""What a device computes in each step of a ring: which of its queries meet which of the keys that it holds.

In step r device d holds the keys that began on device d - r, so their order is static as far as T = S and `q_offset` is
an int: keys of devices d >= r lie r · L behind the queries, those of the others lie ahead. A step that shows nobody
anything is not taken, one that shows a device nothing costs it no time, and one that shows all is not masked. Elsewhere
(T != S, offsets known on the device only) each device judges its own steps.

`block_ids` add to what the order shows. Only in step 0 are they the same for queries and keys, as a mask wants them. In
the others, where queries and keys of a part lie wholly one behind the other, what they add is a second part: pairs of
one block that lie ahead, or behind the window (which is a causal order, as far back as the window is long). The parts
have no pair in common, so their log-sum-exps join them as those of other steps.

Shape letters: L queries of a part, M keys of a part.
"""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from kernels.attention.mask import Mask


class Work(NamedTuple):
    """A part of a step.

    order: of these queries and keys; its arrays are those of all queries of this device.
    moves: the order's `q_offset` is the whole text's, and what it is here is only known on the device.
    of_blocks: only pairs of one block, of keys that no prefix shows.
    """

    order: Mask
    queries: slice
    keys: slice
    moves: bool = False
    of_blocks: bool = False


class Step(NamedTuple):
    """places: how far the keys have come; parts: the work of devices d >= places, and of the others; None: nothing."""

    places: int
    parts: list[tuple[Work | None, Work | None]]


def steps(mask: Mask, num_queries: int, num_keys: int, devices: int, balanced: bool) -> list[Step]:
    """The steps that show anybody anything. num_queries, num_keys: of one device; balanced: the text is dealt."""
    if balanced:
        of = _balanced
    elif not mask.causal:
        of = _in_no_order
    elif num_queries == num_keys and isinstance(mask.q_offset, int):
        of = _in_order
    else:
        of = _judged_by_devices
    found = (Step(places, of(mask, num_queries, num_keys, places, devices)) for places in range(devices))
    kept = (Step(places, [pair for pair in parts if pair != (None, None)]) for places, parts in found)
    return [step for step in kept if step.parts]


def can_be_balanced(mask: Mask, num_queries: int, num_keys: int) -> bool:
    """Whether early and late pieces on each device give all the same work: where the order is causal and nothing else.

    A window already bounds what a device does, and a prefix is seen by all. With an offset, or with other queries than
    keys, neighbours' pieces are no longer wholly seen or wholly hidden; the usual case, a few queries behind many keys,
    is nearly even as it is.
    """
    only_causal = mask.causal and mask.window is None and mask.prefix_length is None
    same_text = num_queries == num_keys and isinstance(mask.q_offset, int) and mask.q_offset == 0
    return only_causal and same_text and num_queries % 2 == 0


def _balanced(mask: Mask, length: int, _: int, places: int, devices: int):
    """Early pieces of devices d - r come before both of a device's own, late ones after; of the others both between."""
    whole, early, late = slice(0, length), slice(0, length // 2), slice(length // 2, length)
    if places == 0:
        return [(Work(mask, whole, whole), None)]
    shown = replace(mask, causal=False, block_ids=None)
    parts = [(Work(shown, whole, early), Work(shown, late, whole))]
    if mask.block_ids is not None:
        parts.append((Work(shown, whole, late, of_blocks=True), Work(shown, early, whole, of_blocks=True)))
    return parts


def _in_no_order(mask: Mask, num_queries: int, num_keys: int, places: int, devices: int):
    work = Work(mask, slice(0, num_queries), slice(0, num_keys))
    return [(work, work)]


def _in_order(mask: Mask, length: int, _: int, places: int, devices: int):
    whole = slice(0, length)
    without = replace(mask, block_ids=None)

    def work(order: Mask | None, **of):
        return None if order is None else Work(order, whole, whole, **of)

    if places == 0:
        return [(work(mask if mask.block_ids is not None else _order(mask, mask.q_offset, length, length)), None)]
    behind, ahead = mask.q_offset + places * length, mask.q_offset + (places - devices) * length
    parts = [tuple(work(_order(without, offset, length, length)) for offset in (behind, ahead))]
    if mask.block_ids is not None:
        beyond = None
        if mask.window is not None:
            beyond = _order(replace(without, window=None, prefix_length=None), behind - mask.window, length, length)
        hidden = replace(without, causal=False, window=None, prefix_length=None)
        parts.append((work(beyond, of_blocks=True), work(hidden, of_blocks=True)))
    return parts


def _judged_by_devices(mask: Mask, num_queries: int, num_keys: int, places: int, devices: int):
    if isinstance(mask.q_offset, int):
        offsets = (mask.q_offset + d * num_queries - (d - places) % devices * num_keys for d in range(devices))
        if all(_order(mask, offset, num_queries, num_keys) is None for offset in offsets):
            return []
    work = Work(mask, slice(0, num_queries), slice(0, num_keys), moves=True)
    return [(work, work)]


def _order(mask: Mask, offset: int, num_queries: int, num_keys: int) -> Mask | None:
    """A causal mask for keys that lie `offset` behind the queries; None where the order shows nothing."""
    nearest, farthest = offset - num_keys + 1, offset + num_queries - 1
    window = farthest + 1 if mask.window is None else mask.window
    if mask.prefix_length is None and (farthest < 0 or nearest >= window):
        return None
    if nearest >= 0 and farthest < window:
        return replace(mask, causal=False, window=None, prefix_length=None)
    return replace(mask, q_offset=offset)


def shows_something(mask: Mask, num_queries: int, num_keys: int):
    """Bool: whether a causal mask of these queries and keys, whatever its arrays, shows any pair by its order."""
    offset = jnp.asarray(mask.q_offset)
    shown = offset + num_queries - 1 >= 0
    if mask.window is not None:
        shown &= offset - num_keys + 1 < mask.window
    if mask.prefix_length is not None:
        shown |= jnp.asarray(mask.prefix_length) > 0
    return jnp.any(shown)


def may_meet(q_ids, k_ids):
    """Bool: False where no non-zero id of a row is among both its `B L` and its `B M`; by their ranges."""

    def ends(ids):
        least, most = jnp.iinfo(ids.dtype).min, jnp.iinfo(ids.dtype).max
        return jnp.where(ids == 0, most, ids).min(axis=1), jnp.where(ids == 0, least, ids).max(axis=1)

    (q_low, q_high), (k_low, k_high) = ends(q_ids), ends(k_ids)
    return jnp.any((q_low <= k_high) & (k_low <= q_high))


def of_pairs(mask: Mask, q_ids, k_ids) -> Mask:
    """The mask, showing only pairs of one non-zero id of q_ids `B L` and k_ids `B M`, of one segment as before."""
    if mask.q_segment_ids is not None:
        q_ids, k_ids = _joint((mask.q_segment_ids, q_ids), (mask.kv_segment_ids, k_ids))
    return replace(mask, q_segment_ids=q_ids, kv_segment_ids=k_ids)


def _joint(of_queries, of_keys):
    """One id for two of queries, and of keys: equal within a row where both are, 0 where one is, and sorted as they."""
    first, second = (jnp.concatenate(pair, axis=1) for pair in zip(of_queries, of_keys, strict=True))
    place = lax.broadcasted_iota(jnp.int32, first.shape, 1)
    first, second, place = lax.sort((first, second, place), dimension=1, num_keys=2)
    changes = (first[:, 1:] != first[:, :-1]) | (second[:, 1:] != second[:, :-1])
    rank = 1 + jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    rank = jnp.where((first == 0) | (second == 0), 0, rank)
    _, rank = lax.sort((place, rank), dimension=1, num_keys=1)
    return jnp.split(rank, [of_queries[0].shape[1]], axis=1)
