"""How often the parts of our attention kernels run: asked of the plan that they themselves make of the mask."""

from dataclasses import replace

import numpy as np

from kernels.attention.mask import Mask
from kernels.static_estimate.compiler import Kernel
from kernels.static_estimate.estimate import Geometry


def attention_geometry(kernel: Kernel, q, k, v, mask: Mask) -> Geometry:
    """Of a kernel that `kernels.attention(q, k, v, mask)` or its gradient compiles to, all its calls together.

    q, k, v: shapes and types are enough. The mask's arrays must be at hand: the runs depend on what is in them.
    """
    from kernels.attention.tpu import blocks, tuning

    (batch, num_queries, num_heads, head_dim), (num_keys, num_kv_heads) = q.shape, k.shape[1:3]
    (_, heads, _, block_queries), (_, _, block_keys, _) = kernel.blocks[:2]  # 1 heads H queries, 1 heads keys H
    if num_keys % block_keys and mask.kv_length is None:
        mask = replace(mask, kv_length=num_keys)
    extent = blocks.Extent(num_queries, num_keys, block_queries, block_keys)
    backward = kernel.name == "attention_backward"
    pieces = tuning.pieces(extent, head_dim + v.shape[-1]) if backward else [extent]
    plan, each = blocks.plans(mask, pieces), num_heads // heads
    entries = np.broadcast_to(plan.table, (len(pieces), batch, np.shape(plan.table)[2]))
    bodies = tuple(each * int((entries & 3 == kind).sum()) for kind in sorted(plan.kinds - {blocks.NOTHING}))
    opened = each * int((entries & blocks.FIRST != 0).sum())
    # The backward also clears what it sums for a key head, once for each of those in each piece.
    rows = (len(pieces) * batch * num_kv_heads, opened) if backward else (opened,)
    return Geometry(bodies, rows, steps=each * batch * int(np.sum(plan.visits)))
