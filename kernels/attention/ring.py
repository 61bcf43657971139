"""Ring attention (Liu et al. 2023, arXiv 2310.01889): the text is split over devices, keys and values travel round.

In step r device d holds the keys that began on device d - r. Parts are joined by their log-sum-exp, so any backend can
compute them. The backward goes round once more: the gradients of keys and values travel with them, and nothing is held
that is larger than a part. What a device computes in which step is said in `steps.py`.

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
from kernels.attention.steps import Work, can_be_balanced, may_meet, of_pairs, shows_something, steps


def attention(run: Callable, axis, q, k, v, mask: Mask, scale: float, softcap: float | None, sinks):
    """As `run(q, k, v, mask, scale, softcap, sinks)` on the whole text, inside a shard_map that splits T and S by
    `axis`.

    q, k, v, segment and block ids are this device's parts; prefix_length, kv_length and q_offset speak of the whole
    text.
    """
    if not mask.causal:  # these say what an order does not hide
        mask = replace(mask, prefix_length=None, q_offset=0, block_ids=None)
    if mask.q_segment_ids is not None:
        mask = replace(mask, kv_segment_ids=mask.key_segments)
    if balanced := can_be_balanced(mask, q.shape[1], k.shape[1]):
        own = q, k, v, mask.q_segment_ids, mask.kv_segment_ids, mask.block_ids
        q, k, v, q_segments, kv_segments, block_ids = dealt(own, axis)
        mask = replace(mask, q_segment_ids=q_segments, kv_segment_ids=kv_segments, block_ids=block_ids)
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

    def compute(mask, queries, keys):
        return run(*queries, *keys, mask, scale, softcap, None), ()

    keys, nothing = _Keys.of(k, v, mask), ((jnp.zeros_like(out, q.dtype), jnp.full_like(lse, -jnp.inf)), ())
    come = 0
    for places, parts in steps(mask, q.shape[1], k.shape[1], lax.axis_size(axis), balanced):
        keys, come = _pass_on(keys, axis, places - come), places
        for works in parts:
            found = _on_this_device(compute, nothing, works, places, axis, balanced, mask, (q,), keys)
            (part_out, part_lse), _ = found
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

    def compute(mask, queries, keys):
        q, d_out, lse, delta = queries
        (part_out, part_lse), pull = jax.vjp(lambda *x: run(*x, mask, scale, softcap, None), q, *keys)
        # out = sum of share · part_out, share = exp(part_lse - lse)
        share = _share(part_lse, lse)
        d_part_out = jnp.where(share > 0, share * d_out, 0).astype(part_out.dtype)
        slope = jnp.sum(d_out.astype(stats) * part_out, axis=-1) - delta
        d_part_lse = jnp.where(share[..., 0] > 0, share[..., 0] * slope, 0)
        d_q, d_k, d_v = (x.astype(stats) for x in pull((d_part_out, d_part_lse)))
        return (d_q,), (d_k, d_v)

    queries, keys = (q, d_out, lse, delta), _Keys.of(k, v, mask)
    d_q, d_k, d_v = (jnp.zeros(x.shape, stats) for x in (q, k, v))
    nothing, come = ((d_q,), (d_k, d_v)), 0
    for places, parts in steps(mask, q.shape[1], k.shape[1], lax.axis_size(axis), balanced):
        (keys, d_k, d_v), come = _pass_on((keys, d_k, d_v), axis, places - come), places
        for works in parts:
            found = _on_this_device(compute, nothing, works, places, axis, balanced, mask, queries, keys)
            d_q, d_k, d_v = jax.tree.map(jnp.add, (d_q, d_k, d_v), (*found[0], *found[1]))
    d_k, d_v = _pass_on((d_k, d_v), axis, -come)  # home
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_forward, _backward)


def _share(part, total):
    """exp(part - total) `B T N 1`, 0 where the part saw no key."""
    return jnp.exp(part - jnp.where(jnp.isneginf(total), 0, total))[..., None]


class _Keys(NamedTuple):
    """What travels."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    blocks: jax.Array | None

    @classmethod
    def of(cls, k, v, mask: Mask) -> "_Keys":
        return cls(k, v, mask.kv_segment_ids, mask.block_ids)


def _on_this_device(compute, nothing, works, places: int, axis, balanced: bool, mask: Mask, queries, keys: _Keys):
    """compute(mask, queries, keys) of this device's work in this step, put into `nothing` where it belongs.

    All trees of arrays whose second dimension is L or M: `queries` and the first of what comes back are by query,
    `keys` and the second by key.
    """
    devices, num_queries, num_keys = lax.axis_size(axis), queries[0].shape[1], keys.k.shape[1]
    device = lax.axis_index(axis)
    source = (device - places) % devices
    starts = [source * num_keys]
    if balanced:
        starts = [source * (num_keys // 2), (2 * devices - 1 - source) * (num_keys // 2)]

    def branch(work: Work | None):
        if work is None:
            return lambda: nothing
        own, q_at, k_at = work.order, work.queries, work.keys
        if own.q_segment_ids is not None:
            own = replace(own, q_segment_ids=own.q_segment_ids[:, q_at], kv_segment_ids=keys.segments[:, k_at])
        if work.moves:
            own = replace(own, q_offset=own.q_offset + device * num_queries - starts[0])
        if own.prefix_length is not None:
            own = replace(own, prefix_length=own.prefix_length - starts[0])
        if own.kv_length is not None:  # a piece before another one ends is whole
            size = num_keys // len(starts)
            there = sum(jnp.clip(own.kv_length - start, 0, size) for start in starts)
            own = replace(own, kv_length=jnp.clip(there - k_at.start, 0, k_at.stop - k_at.start))

        def run(own=own):
            found = compute(own, tuple(x[:, q_at] for x in queries), (keys.k[:, k_at], keys.v[:, k_at]))
            return tuple(
                jax.tree.map(lambda all_of_it, x, at=at: all_of_it.at[:, at].set(x), *pair)
                for at, *pair in zip((q_at, k_at), nothing, found, strict=True)
            )

        if work.moves:
            return lambda: lax.cond(shows_something(own, num_queries, num_keys), run, lambda: nothing)
        if work.of_blocks:
            ids = mask.block_ids[:, q_at], keys.blocks[:, k_at]
            if mask.prefix_length is not None:  # the order shows what lies before
                places_of_keys = starts[0] + lax.iota(jnp.int32, num_keys)[k_at]
                in_prefix = places_of_keys < jnp.reshape(mask.prefix_length, (-1, 1))
                ids = ids[0], jnp.where(in_prefix, 0, ids[1])
            return lambda: lax.cond(may_meet(*ids), lambda: run(of_pairs(own, *ids)), lambda: nothing)
        return run

    behind, ahead = works
    if places == 0 or behind is ahead:
        return branch(behind)()
    return lax.cond(device >= places, branch(behind), branch(ahead))


def _pass_on(tree, axis, places: int):
    """Everything to the device that stands `places` further on."""
    devices = lax.axis_size(axis)
    if places == 0:
        return tree
    return lax.ppermute(tree, axis, [(source, (source + places) % devices) for source in range(devices)])
