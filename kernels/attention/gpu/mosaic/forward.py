"""The forward kernel: a block of 128 queries of one head against the blocks of keys that it visits.

FlashAttention-3's division of work (arXiv 2407.08608, algorithm 1): one warpgroup copies keys and values ahead, two
compute, so that the matrix units work for one while the other makes its softmax. Heads of a group read the same keys.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.attention.gpu.mosaic import tile
from kernels.attention.gpu.mosaic.plan import Numbers, Visits
from kernels.attention.gpu.mosaic.tile import COMPUTE, NEVER, ROWS, Logit, across
from kernels.attention.gpu.mosaic.tuning import Ring


def forward(q, k, v, found: Numbers, plan: Visits, sinks, *, logit: Logit, ring: Ring):
    """Output `B T N V` in q's type, and float32 `B N T`: the log-sum-exp over the keys alone, -inf without any.

    q `B T N H`, k `B S K H`, v `B S K V`: T a multiple of 128, S of the ring's block, H and V of 16.
    sinks: float32 `N`, in base 2, or None.
    """
    (batch, num_queries, num_heads, width), (num_kv_heads, v_width) = q.shape, v.shape[2:]
    seen, numbers, ids = found
    group = num_heads // num_kv_heads
    blocks = plan.table.shape[1]
    shape = ROWS, ring.size
    optional = [x for x in (ids, sinks) if x is not None]

    def attention_forward(q, k, v, table, counts, numbers, *rest):
        *rest, out, lse = rest
        ids_ref = rest.pop(0) if ids is not None else None
        sink_ref = rest.pop(0) if sinks is not None else None
        head, batch_row, who = (lax.axis_index(name) for name in ("head", "batch", "warpgroup"))
        block = blocks - 1 - lax.axis_index("block")  # the longest rows of a causal mask first
        row = batch_row if table.shape[0] > 1 else 0
        kv_head = lax.div(head, group)

        def both(tiles, ready, rings, barriers):
            (q_tile, out_tile, number_tile, lse_tile), (k_ring, v_ring, id_ring) = tiles, rings
            k_full, v_full, k_free, v_free = barriers

            @pl.when(who < COMPUTE)
            def _():
                plgpu.set_max_registers(tile.COMPUTE_REGISTERS, action="increase")
                mine = pl.ds((block * COMPUTE + who) * ROWS, ROWS)
                q_mine, out_mine = q_tile.at[who], (q_tile if out_tile is None else out_tile).at[who]
                plgpu.copy_gmem_to_smem(q.at[batch_row, mine, head], q_mine, ready.at[who])
                plgpu.copy_gmem_to_smem(numbers.at[row, :, mine], number_tile.at[who], ready.at[who])
                plgpu.barrier_wait(ready.at[who])

                def step(i, key_block, carry):
                    total, top, weight = carry
                    slot = lax.rem(i, ring.slots)
                    plgpu.barrier_wait(k_full.at[slot])
                    logits = logit.of(tile.product_with_rows(q_mine, k_ring.at[slot]))
                    if key_block is not None:
                        allowed = tile.visible(
                            seen,
                            lambda n: number_tile[who, n],
                            lambda n: id_ring[slot, n],
                            key_block * ring.size,
                            shape,
                            query_axis=0,
                        )
                        logits = jnp.where(allowed, logits, -jnp.inf)
                    plgpu.barrier_arrive(k_free.at[slot])
                    higher = jnp.maximum(top, logits.max(axis=1) * logit.factor)
                    weights = jnp.exp2(logits * logit.factor - across(higher, shape, 0))
                    shrink = jnp.exp2(top - higher)
                    weight = weight * shrink + weights.sum(axis=1)
                    total = total * across(shrink, total.shape, 0)
                    plgpu.barrier_wait(v_full.at[slot])
                    total = tile.add_product(total, weights.astype(v.dtype), v_ring.at[slot])
                    plgpu.barrier_arrive(v_free.at[slot])
                    return total, higher, weight

                fills = ((ROWS, v_width), 0), (ROWS, -NEVER), (ROWS, 0)
                start = [jnp.full(size, fill, jnp.float32) for size, fill in fills]
                total, top, weight = tile.each_visit(table, counts, row, block, step, tuple(start))
                live = weight > 0
                lse_tile[who] = jnp.where(live, top / tile.LOG2_E + jnp.log(jnp.where(live, weight, 1.0)), -jnp.inf)
                if sink_ref is not None:
                    weight = weight + jnp.exp2(sink_ref[head] - top)
                weight = jnp.where(live, weight, 1.0)
                out_mine[...] = (total / across(weight, total.shape, 0)).astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_mine, out.at[batch_row, mine, head])
                plgpu.copy_smem_to_gmem(lse_tile.at[who], lse.at[batch_row, head, mine])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(who == COMPUTE)
            def _():
                def sources(i):
                    keys = pl.ds(table[row, block, i] * ring.size, ring.size)
                    ids = None if ids_ref is None else ids_ref.at[row, :, keys]
                    return k.at[batch_row, keys, kv_head], v.at[batch_row, keys, kv_head], ids

                tile.copy_keys(sources, counts[row, block, 1], rings, barriers, ring.slots)

        pl.run_scoped(
            both,
            (
                plgpu.SMEM((COMPUTE, ROWS, width), q.dtype),
                None if v_width == width else plgpu.SMEM((COMPUTE, ROWS, v_width), q.dtype),
                plgpu.SMEM((COMPUTE, numbers.shape[1], ROWS), jnp.int32),
                plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            ),
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            *tile.key_ring(ring, width, v_width, ids, k.dtype),
            collective_axes="warpgroup",
        )

    outputs = [
        jax.ShapeDtypeStruct((batch, num_queries, num_heads, v_width), q.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
    ]
    arguments = q, k, v, plan.table, plan.counts, numbers, *optional
    return tile.run(attention_forward, arguments, outputs, {"batch": batch, "block": blocks, "head": num_heads})
