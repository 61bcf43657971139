"""Ring attention (Liu et al. 2023, arXiv 2310.01889): the text is split over devices, keys and values travel round.

Device d holds part d of the queries and, in step r, part d - r of the keys. Parts are joined by their log-sum-exp, so
any backend can compute them. The backward goes round once more: the gradients of keys and values travel with them, and
nothing is held that is larger than a part. Shape letters: L length of a part.

Order is static, as far as it can be: in step r the keys of device d >= r lie r · L behind its queries, those of the
others lie ahead. A step that shows nobody anything is not taken, one that shows a device nothing costs it no time, and
one that shows all is not masked. With a causal mask the last device has the most to do and sets the time.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

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
    out, lse = _ring(run, axis, q, k, v, mask, scale, softcap)
    if sinks is None:
        return out, lse
    # A sink is no key: it joins once, at the end.
    total = jnp.logaddexp(lse, sinks.astype(lse.dtype))
    share = jnp.exp(lse - total)[..., None]
    return jnp.where(jnp.isneginf(lse)[..., None], 0, out * share).astype(out.dtype), total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6, 7))
def _ring(run, axis, q, k, v, mask: Mask, scale: float, softcap: float | None):
    return _forward(run, axis, q, k, v, mask, scale, softcap)[0]


def _forward(run, axis, q, k, v, mask, scale, softcap):
    stats = jnp.promote_types(q.dtype, jnp.float32)
    shape = (*q.shape[:3], v.shape[-1])
    out, lse = jnp.zeros(shape, stats), jnp.full(shape[:3], -jnp.inf, stats)

    def part(mask, q, k, v):
        return run(q, k, v, mask, scale, softcap, None)

    keys = k, v, mask.kv_segment_ids
    for step, masks in enumerate(_steps(mask, q.shape[1], lax.axis_size(axis))):
        keys = _pass_on(keys, axis, 1) if step else keys
        k_part, v_part, segments = keys
        nothing = jnp.zeros_like(out, q.dtype), jnp.full_like(lse, -jnp.inf)
        part_out, part_lse = _on_this_device(part, nothing, masks, step, axis, mask, segments, q, k_part, v_part)
        total = jnp.logaddexp(lse, part_lse)
        out = out * _share(lse, total) + part_out * _share(part_lse, total)
        lse = total
    out = out.astype(q.dtype)
    return (out, lse), (q, k, v, mask, out, lse)


def _backward(run, axis, scale, softcap, saved, cotangents):
    q, k, v, mask, out, lse = saved
    d_out, d_lse = cotangents
    stats = lse.dtype
    delta = jnp.sum(d_out.astype(stats) * out, axis=-1) - d_lse

    def part(mask, q, k, v):
        (part_out, part_lse), pull = jax.vjp(lambda *x: run(*x, mask, scale, softcap, None), q, k, v)
        # out = sum of share · part_out, share = exp(part_lse - lse)
        share = _share(part_lse, lse)
        d_part_out = jnp.where(share > 0, share * d_out, 0).astype(part_out.dtype)
        slope = jnp.sum(d_out.astype(stats) * part_out, axis=-1) - delta
        d_part_lse = jnp.where(share[..., 0] > 0, share[..., 0] * slope, 0)
        return tuple(x.astype(stats) for x in pull((d_part_out, d_part_lse)))

    d_q, d_k, d_v = nothing = tuple(jnp.zeros(x.shape, stats) for x in (q, k, v))
    keys, steps = (k, v, mask.kv_segment_ids), _steps(mask, q.shape[1], lax.axis_size(axis))
    for step, masks in enumerate(steps):
        keys, d_k, d_v = _pass_on((keys, d_k, d_v), axis, 1) if step else (keys, d_k, d_v)
        k_part, v_part, segments = keys
        parts = _on_this_device(part, nothing, masks, step, axis, mask, segments, q, k_part, v_part)
        d_q, d_k, d_v = (so_far + x for so_far, x in zip((d_q, d_k, d_v), parts, strict=True))
    d_k, d_v = _pass_on((d_k, d_v), axis, 1 - len(steps))  # home
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_forward, _backward)


def _share(part, total):
    """exp(part - total) `B T N 1`, 0 where the part saw no key."""
    return jnp.exp(part - jnp.where(jnp.isneginf(total), 0, total))[..., None]


def _steps(mask: Mask, length: int, parts: int) -> list[tuple[Mask | None, Mask | None]]:
    """For each step that shows anybody anything: the order for devices d >= step, and for the others; None: nothing."""
    orders = [(_order(mask, r * length, length), _order(mask, (r - parts) * length, length)) for r in range(parts)]
    while orders[-1] == (None, None):
        orders.pop()
    return orders


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


def _on_this_device(compute, nothing, masks, step: int, axis, mask: Mask, segments, q, k, v):
    """compute(mask, q, k, v) with this device's mask in this step, `nothing` where it sees nothing."""
    before = (lax.axis_index(axis) - step) % lax.axis_size(axis) * k.shape[1]  # keys before these

    def branch(order: Mask | None):
        if order is None:
            return lambda q, k, v: nothing
        own = replace(order, kv_segment_ids=segments)
        if own.prefix_length is not None:
            own = replace(own, prefix_length=own.prefix_length - before)
        if own.kv_length is not None:
            own = replace(own, kv_length=jnp.clip(own.kv_length - before, 0, k.shape[1]))
        return functools.partial(compute, own)

    behind, ahead = masks
    if step == 0 or not mask.causal:
        return branch(behind)(q, k, v)
    return lax.cond(lax.axis_index(axis) >= step, branch(behind), branch(ahead), q, k, v)


def _pass_on(tree, axis, places: int):
    """Everything to the device that stands `places` further on."""
    parts = lax.axis_size(axis)
    if places == 0:
        return tree
    return lax.ppermute(tree, axis, [(source, (source + places) % parts) for source in range(parts)])
