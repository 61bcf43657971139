"""Attention on a mesh: each device takes its rows, its heads and, where the text is split too, its part of a ring.

A Pallas kernel can't be split by XLA, and XLA gathers what it can't split, so every backend is run by `shard_map`.
What splits what is said by one PartitionSpec, q's own: (axes of B, axes of T, axes of N). `kernels.decode_attention` is
split here too: only its keys and values lie heads first, and may be quantised.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from kernels.attention import ring
from kernels.attention.mask import Mask


def over_mesh(
    run: Callable,
    spec: PartitionSpec,
    q,
    k,
    v,
    mask: Mask,
    scale: float,
    softcap: float | None,
    sinks,
    *,
    heads_first: bool = False,
):
    """What `run(q, k, v, mask, scale, softcap, sinks)` gives, computed where `spec` says on the mesh in context.

    Fewer key heads than the heads are split into: each device then reads one of them, and holds them all. What is not
    split is computed by every device.

    heads_first: k and v are `B K S H`, arrays or trees of them that begin so; T is then whole.

    Raises ValueError: axes that are not the mesh's, or that don't divide what they split.
    """
    key_heads = 1 if heads_first else 2
    mesh = jax.sharding.get_abstract_mesh()
    rows, text, heads = (_split_axes(axes, mesh) for axes in (*spec, None, None, None)[:3])
    if mesh.size == 1:
        return run(q, k, v, mask, scale, softcap, sinks)
    if text is not None and heads_first:
        raise ValueError(f"{spec} splits T = {q.shape[1]} new tokens: they read the whole cache, split rows and heads")
    ways = [_ways(axes, mesh) for axes in (rows, text, heads)]
    sizes = (*q.shape[:3], *(() if text is None else k.shape[1:2]))
    for name, size, parts in zip("BTNS", sizes, (*ways, ways[1]), strict=False):
        if size % parts:
            raise ValueError(f"{name} = {size} is not divisible by the {parts} devices that {spec} splits it over")
    num_kv_heads, head_ways = jax.tree.leaves(k)[0].shape[key_heads], ways[2]
    share_key_head = num_kv_heads % head_ways != 0
    if share_key_head and head_ways % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} key heads can't be split over the {head_ways} devices of {heads!r}: one number must "
            f"divide the other"
        )

    def on_device(q, k, v, mask, sinks):
        if share_key_head:
            own = lax.axis_index(heads) * num_kv_heads // head_ways
            k, v = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, own, 1, axis=key_heads), (k, v))
        if text is None:
            return run(q, k, v, mask, scale, softcap, sinks)
        return ring.attention(run, text, q, k, v, mask, scale, softcap, sinks)

    queries, own_heads = PartitionSpec(rows, text, heads), None if share_key_head else heads
    keys = PartitionSpec(rows, own_heads) if heads_first else PartitionSpec(rows, text, own_heads)
    of_mask = jax.tree.map(lambda x: PartitionSpec(*(rows, text)[: np.ndim(x)]), mask)
    in_specs = queries, keys, keys, of_mask, PartitionSpec(heads)
    # Pallas kernels don't say over which axes their outputs vary.
    split = jax.shard_map(on_device, in_specs=in_specs, out_specs=queries, check_vma=False)
    return split(q, k, v, mask, sinks)


def _split_axes(axes: str | tuple[str, ...] | None, mesh) -> str | tuple[str, ...] | None:
    """None where these axes split nothing, as on one device."""
    return axes if _ways(axes, mesh) > 1 else None


def _ways(axes: str | tuple[str, ...] | None, mesh) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    if missing := [name for name in names if name not in mesh.shape]:
        raise ValueError(f"the mesh in context has no axes {missing}; it has {dict(mesh.shape)}: see jax.set_mesh")
    return int(np.prod([mesh.shape[name] for name in names]))
