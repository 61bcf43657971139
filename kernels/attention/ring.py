"""Ring attention (Liu et al. 2023, arXiv 2310.01889): the text is split over devices, keys and values travel round.

In step r device d holds the keys that began on device d - r. Parts are joined by their log-sum-exp, so any backend can
compute them. The backward goes round once more: the gradients of keys and values travel with them, and nothing is held
that is larger than a part. Shape letters: L length of a part.

Order is static, as far as it can be: in step r the keys of device d >= r lie r · L behind its queries, those of the
others lie ahead. A step that shows nobody anything is not taken, one that shows a device nothing costs it no time, and
one that shows all is not masked.

Where the order is causal and nothing else, the last part of the text would have all the work and the first hardly any.
So each device takes an early and a late piece of the text instead, numbers d and 2P - 1 - d of 2P for P devices, and
in every step exactly half of a part's pairs, none of them masked (Brandon et al. 2023, arXiv 2311.09431, balance the
same by stripes).
They are exchanged on the way in and out: callers see the text in order (`dealing.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.dealing import dealt, in_order
from kernels.attention.mask import Mask


def check(mask: Mask, num_queries: int, num_keys: int) -> None:
    """Raises ValueError for what a ring can't do."""
    if num_queries != num_keys or not isinstance(mask.q_offset, int) or mask.q_offset:
        raise ValueError(
            f"a text that is split over devices needs as many keys as queries and q_offset=0, found {num_queries} "
            f"queries, {num_keys} keys, q_offset={mask.q_offset}"
        )
    if mask.block_ids is not None:
        raise ValueError("block_ids can't be honoured where the text is split over devices: split rows or heads only")


def attention(run: Callable, axis, q, k, v, mask: Mask, scale: float, softcap: float | None, sinks):
    """As `run(q, k, v, mask, scale, softcap, sinks)` on the whole text, inside a shard_map that splits T over `axis`.

    q, k, v and segment ids are this device's parts; prefix_length and kv_length speak of the whole text.
    """
    if mask.q_segment_ids is not None:
        mask = replace(mask, kv_segment_ids=mask.key_segments)
    if balanced := _can_be_balanced(mask, q.shape[1]):
        own = q, k, v, mask.q_segment_ids, mask.kv_segment_ids
        q, k, v, q_segments, kv_segments = dealt(own, axis)
        mask = replace(mask, q_segment_ids=q_segments, kv_segment_ids=kv_segments)
    out, lse = _ring(run, axis, balanced, q, k, v, mask, scale, softcap)
    if balanced:
        out, lse = in_order((out, lse), axis)
    if sinks is None:
        return out, lse
    # A sink is no key: it joins once, at the end.
    total = jnp.logaddexp(lse, sinks.astype(lse.dtype))
    share = jnp.exp(lse - total)[..., None]
    return jnp.where(jnp.isneginf(lse)[..., None], 0, out * share).astype(out.dtype), total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 7, 8))
def _ring(run, axis, balanced: bool, q, k, v, mask: Mask, scale: float, softcap: float | None):
    return _forward(run, axis, balanced, q, k, v, mask, scale, softcap)[0]


def _forward(run, axis, balanced, q, k, v, mask, scale, softcap):
    stats = jnp.promote_types(q.dtype, jnp.float32)
    shape = (*q.shape[:3], v.shape[-1])
    out, lse = jnp.zeros(shape, stats), jnp.full(shape[:3], -jnp.inf, stats)

    def part(mask, queries, keys):
        return run(*queries, *keys, mask, scale, softcap, None), ()

    keys, nothing = (k, v, mask.kv_segment_ids), ((jnp.zeros_like(out, q.dtype), jnp.full_like(lse, -jnp.inf)), ())
    for step, work in enumerate(_steps(mask, q.shape[1], lax.axis_size(axis), balanced)):
        keys = _pass_on(keys, axis, 1) if step else keys
        (part_out, part_lse), _ = _on_this_device(part, nothing, work, step, axis, balanced, mask, (q,), keys)
        total = jnp.logaddexp(lse, part_lse)
        out = out * _share(lse, total) + part_out * _share(part_lse, total)
        lse = total
    out = out.astype(q.dtype)
    return (out, lse), (q, k, v, mask, out, lse)


def _backward(run, axis, balanced, scale, softcap, saved, cotangents):
    q, k, v, mask, out, lse = saved
    d_out, d_lse = cotangents
    stats = lse.dtype
    delta = jnp.sum(d_out.astype(stats) * out, axis=-1) - d_lse

    def part(mask, queries, keys):
        q, d_out, lse, delta = queries
        (part_out, part_lse), pull = jax.vjp(lambda *x: run(*x, mask, scale, softcap, None), q, *keys)
        # out = sum of share · part_out, share = exp(part_lse - lse)
        share = _share(part_lse, lse)
        d_part_out = jnp.where(share > 0, share * d_out, 0).astype(part_out.dtype)
        slope = jnp.sum(d_out.astype(stats) * part_out, axis=-1) - delta
        d_part_lse = jnp.where(share[..., 0] > 0, share[..., 0] * slope, 0)
        d_q, d_k, d_v = (x.astype(stats) for x in pull((d_part_out, d_part_lse)))
        return (d_q,), (d_k, d_v)

    queries, keys = (q, d_out, lse, delta), (k, v, mask.kv_segment_ids)
    d_q, d_k, d_v = (jnp.zeros(x.shape, stats) for x in (q, k, v))
    nothing, steps = ((d_q,), (d_k, d_v)), _steps(mask, q.shape[1], lax.axis_size(axis), balanced)
    for step, work in enumerate(steps):
        keys, d_k, d_v = _pass_on((keys, d_k, d_v), axis, 1) if step else (keys, d_k, d_v)
        (more_q,), (more_k, more_v) = _on_this_device(part, nothing, work, step, axis, balanced, mask, queries, keys)
        d_q, d_k, d_v = d_q + more_q, d_k + more_k, d_v + more_v
    d_k, d_v = _pass_on((d_k, d_v), axis, 1 - len(steps))  # home
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_forward, _backward)


def _share(part, total):
    """exp(part - total) `B T N 1`, 0 where the part saw no key."""
    return jnp.exp(part - jnp.where(jnp.isneginf(total), 0, total))[..., None]


class Work(NamedTuple):
    """What a device computes in a step: which of its queries meet which of the keys that it holds, in what order."""

    order: Mask
    queries: slice
    keys: slice


def _steps(mask: Mask, length: int, parts: int, balanced: bool) -> list[tuple[Work | None, Work | None]]:
    """For each step that shows anybody anything: the work of devices d >= step, and of the others; None: nothing."""
    whole = slice(0, length)
    if balanced:  # early pieces of devices d - r come before its own two, late ones after; of the others both between
        early, late, all_of_it = slice(0, length // 2), slice(length // 2, length), replace(mask, causal=False)
        later = Work(all_of_it, whole, early), Work(all_of_it, late, whole)
        return [(Work(mask, whole, whole), None)] + [later] * (parts - 1)

    def work(offset: int) -> Work | None:
        order = _order(mask, offset, length)
        return None if order is None else Work(order, whole, whole)

    works = [(work(r * length), work((r - parts) * length)) for r in range(parts)]
    while works[-1] == (None, None):
        works.pop()
    return works


def _order(mask: Mask, offset: int, length: int) -> Mask | None:
    """The mask for keys that lie `offset` behind the queries; None where the order shows nothing."""
    if not mask.causal:
        return mask
    nearest, farthest = offset - length + 1, offset + length - 1
    window = farthest + 1 if mask.window is None else mask.window
    if mask.prefix_length is None and (farthest < 0 or nearest >= window):
        return None
    if nearest >= 0 and farthest < window:
        return replace(mask, causal=False, window=None, prefix_length=None)
    return replace(mask, q_offset=offset)


def _on_this_device(compute, nothing, work, step: int, axis, balanced: bool, mask: Mask, queries, keys):
    """compute(mask, queries, keys) of this device's work in this step, put into `nothing` where it belongs.

    All trees of arrays whose second dimension is L: `queries` and the first of what comes back are by query, (k, v) of
    `keys` and the second by key.
    """
    k, v, segments = keys
    parts, length = lax.axis_size(axis), k.shape[1]
    source = (lax.axis_index(axis) - step) % parts
    starts = [source * length]
    if balanced:
        starts = [source * (length // 2), (2 * parts - 1 - source) * (length // 2)]

    def branch(work: Work | None):
        if work is None:
            return lambda: nothing
        own, q_at, k_at = work
        if segments is not None:
            own = replace(own, q_segment_ids=own.q_segment_ids[:, q_at], kv_segment_ids=segments[:, k_at])
        if own.prefix_length is not None:
            own = replace(own, prefix_length=own.prefix_length - starts[0])
        if own.kv_length is not None:  # a piece before another one ends is whole
            size = length // len(starts)
            there = sum(jnp.clip(own.kv_length - start, 0, size) for start in starts)
            own = replace(own, kv_length=jnp.minimum(there, k_at.stop))

        def run():
            found = compute(own, tuple(x[:, q_at] for x in queries), (k[:, k_at], v[:, k_at]))
            return tuple(
                jax.tree.map(lambda all_of_it, x, at=at: all_of_it.at[:, at].set(x), *pair)
                for at, *pair in zip((q_at, k_at), nothing, found, strict=True)
            )

        return run

    behind, ahead = work
    if step == 0 or not mask.causal:
        return branch(behind)()
    return lax.cond(lax.axis_index(axis) >= step, branch(behind), branch(ahead))


def _can_be_balanced(mask: Mask, length: int) -> bool:
    """A window already bounds what a device does, and a prefix is seen by all."""
    return mask.causal and mask.window is None and mask.prefix_length is None and length % 2 == 0


def _pass_on(tree, axis, places: int):
    """Everything to the device that stands `places` further on."""
    parts = lax.axis_size(axis)
    if places == 0:
        return tree
    return lax.ppermute(tree, axis, [(source, (source + places) % parts) for source in range(parts)])
