"""The backward kernel for queries: as the forward, but its sum is dQ.

The maths of both is FlashAttention-2's (arXiv 2307.08691, algorithm 2), each product of logits made twice in all.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.attention.gpu.mosaic import tile
from kernels.attention.gpu.mosaic.plan import Numbers, Visits
from kernels.attention.gpu.mosaic.tile import COMPUTE, ROWS, Logit, across
from kernels.attention.gpu.mosaic.tuning import Ring


def backward(q, k, v, d_out, stats, found: Numbers, plan: Visits, *, logit: Logit, ring: Ring):
    """dQ `B T N H` in q's type. T is a multiple of 128, S of the ring's block, H and V of 16.

    stats: float32 `B N 2 T`: the log-sum-exp in base 2, and what is taken off dP.
    """
    (batch, _, num_heads, width), (num_kv_heads, v_width) = q.shape, v.shape[2:]
    seen, numbers, ids = found
    group = num_heads // num_kv_heads
    blocks = plan.table.shape[1]
    shape = ROWS, ring.size

    def attention_backward_queries(q, k, v, d_out, stats, table, counts, numbers, *rest):
        ids_ref, d_q = rest if len(rest) == 2 else (None, *rest)
        head, batch_row, who = (lax.axis_index(name) for name in ("head", "batch", "warpgroup"))
        block = blocks - 1 - lax.axis_index("block")
        row = batch_row if table.shape[0] > 1 else 0
        kv_head = lax.div(head, group)

        def both(tiles, ready, rings, barriers):
            (q_tile, d_out_tile, stats_tile, number_tile), (k_ring, v_ring, id_ring) = tiles, rings
            k_full, v_full, k_free, v_free = barriers

            @pl.when(who < COMPUTE)
            def _():
                plgpu.set_max_registers(tile.COMPUTE_REGISTERS, action="increase")
                mine = pl.ds((block * COMPUTE + who) * ROWS, ROWS)
                for source, mine_of in (
                    (q.at[batch_row, mine, head], q_tile),
                    (d_out.at[batch_row, mine, head], d_out_tile),
                    (stats.at[batch_row, head, :, mine], stats_tile),
                    (numbers.at[row, :, mine], number_tile),
                ):
                    plgpu.copy_gmem_to_smem(source, mine_of.at[who], ready.at[who])
                plgpu.barrier_wait(ready.at[who])
                lse, delta = stats_tile[who, 0], stats_tile[who, 1]

                def step(i, key_block, d_q):
                    slot = lax.rem(i, ring.slots)
                    plgpu.barrier_wait(k_full.at[slot])
                    product = tile.product_with_rows(q_tile.at[who], k_ring.at[slot])
                    weights = jnp.exp2(logit.of(product) * logit.factor - across(lse, shape, 0))
                    if key_block is not None:
                        allowed = tile.visible(
                            seen,
                            lambda n: number_tile[who, n],
                            lambda n: id_ring[slot, n],
                            key_block * ring.size,
                            shape,
                            query_axis=0,
                        )
                        weights = jnp.where(allowed, weights, 0.0)
                    pulled = logit.pull(weights, product)  # here, as two tiles of registers are free from now on
                    plgpu.barrier_wait(v_full.at[slot])
                    d_weights = tile.product_with_rows(d_out_tile.at[who], v_ring.at[slot])
                    plgpu.barrier_arrive(v_free.at[slot])
                    d_logits = pulled * (d_weights - across(delta, shape, 0))
                    d_q = tile.add_product(d_q, d_logits.astype(k.dtype), k_ring.at[slot])
                    plgpu.barrier_arrive(k_free.at[slot])
                    return d_q

                total = jnp.full((ROWS, width), 0, jnp.float32)
                total = tile.each_visit(table, counts, row, block, step, total)
                q_tile[who] = (total * logit.scale).astype(d_q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_tile.at[who], d_q.at[batch_row, mine, head])
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
                plgpu.SMEM((COMPUTE, ROWS, v_width), q.dtype),
                plgpu.SMEM((COMPUTE, 2, ROWS), jnp.float32),
                plgpu.SMEM((COMPUTE, numbers.shape[1], ROWS), jnp.int32),
            ),
            plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTE),
            *tile.key_ring(ring, width, v_width, ids, k.dtype),
            collective_axes="warpgroup",
        )

    arguments = q, k, v, d_out, stats, plan.table, plan.counts, numbers, *(() if ids is None else (ids,))
    grid = {"batch": batch, "block": blocks, "head": num_heads}
    return tile.run(attention_backward_queries, arguments, jax.ShapeDtypeStruct(q.shape, q.dtype), grid)
