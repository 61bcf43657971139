"""The backward kernel for keys and values: a block of 128 keys of one key head against the queries that see it.

All heads of its group come one after the other, so that each sum has one owner, and is the same in every run. Tiles lie
the other way round: keys are rows, queries columns.
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


def backward(q, k, v, d_out, stats, found: Numbers, plan: Visits, *, logit: Logit, ring: Ring, sums: str):
    """dK `B S K H` and dV `B S K V` in k's type, or one of them: `sums` is "kv", "k" or "v", as registers are few.

    T is a multiple of the ring's block, S of 128, H and V of 16. stats: as in `backward_queries`.
    """
    (batch, num_keys, num_kv_heads, width), v_width = k.shape, v.shape[3]
    seen, numbers, ids = found
    group = q.shape[2] // num_kv_heads
    blocks = plan.table.shape[1]
    shape = ROWS, ring.size
    widths = {"k": width, "v": v_width}

    def attention_backward_keys(q, k, v, d_out, stats, table, counts, numbers, *rest):
        ids_ref, outs = (None, rest) if ids is None else (rest[0], rest[1:])
        kv_head, block, batch_row, who = (lax.axis_index(name) for name in ("head", "block", "batch", "warpgroup"))
        row = batch_row if table.shape[0] > 1 else 0
        count = counts[row, block, 1]

        def both(tiles, rings, ready, q_full, d_out_full, q_free, d_out_free):
            (k_tile, v_tile, id_tile), (q_ring, d_out_ring, stats_ring, number_ring) = tiles, rings

            @pl.when(who < COMPUTE)
            def _():
                plgpu.set_max_registers(tile.COMPUTE_REGISTERS, action="increase")
                mine = pl.ds((block * COMPUTE + who) * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(k.at[batch_row, mine, kv_head], k_tile.at[who], ready.at[who])
                plgpu.copy_gmem_to_smem(v.at[batch_row, mine, kv_head], v_tile.at[who], ready.at[who])
                if ids_ref is not None:
                    plgpu.copy_gmem_to_smem(ids_ref.at[row, :, mine], id_tile.at[who], ready.at[who])
                plgpu.barrier_wait(ready.at[who])

                def step(before, i, query_block, totals):
                    totals = dict(zip(sums, totals, strict=True))
                    slot = lax.rem(before + i, ring.slots)
                    plgpu.barrier_wait(q_full.at[slot])
                    product = tile.product_with_rows(k_tile.at[who], q_ring.at[slot])
                    weights = jnp.exp2(logit.of(product) * logit.factor - across(stats_ring[slot, 0], shape, 1))
                    if query_block is not None:
                        allowed = tile.visible(
                            seen,
                            lambda n: number_ring[slot, n],
                            lambda n: id_tile[who, n],
                            (block * COMPUTE + who) * ROWS,
                            shape,
                            query_axis=1,
                        )
                        weights = jnp.where(allowed, weights, 0.0)
                    pulled = logit.pull(weights, product)  # here, as two tiles of registers are free from now on
                    plgpu.barrier_wait(d_out_full.at[slot])
                    if "v" in sums:
                        totals["v"] = tile.add_product(totals["v"], weights.astype(v.dtype), d_out_ring.at[slot])
                    if "k" in sums:
                        d_weights = tile.product_with_rows(v_tile.at[who], d_out_ring.at[slot])
                    plgpu.barrier_arrive(d_out_free.at[slot])
                    if "k" in sums:
                        d_logits = pulled * (d_weights - across(stats_ring[slot, 1], shape, 1))
                        totals["k"] = tile.add_product(totals["k"], d_logits.astype(q.dtype), q_ring.at[slot])
                    plgpu.barrier_arrive(q_free.at[slot])
                    return tuple(totals.values())

                def one_head(head, totals):
                    def of_head(i, query_block, totals):
                        return step(head * count, i, query_block, totals)

                    return tile.each_visit(table, counts, row, block, of_head, totals)

                totals = tuple(jnp.full((ROWS, widths[name]), 0, jnp.float32) for name in sums)
                totals = lax.fori_loop(0, group, one_head, totals)
                places = {"k": k_tile.at[who], "v": v_tile.at[who]}
                for name, total in zip(sums, totals, strict=True):
                    places[name][...] = (total * (logit.scale if name == "k" else 1)).astype(k.dtype)
                plgpu.commit_smem()
                for name, out in zip(sums, outs, strict=True):
                    plgpu.copy_smem_to_gmem(places[name], out.at[batch_row, mine, kv_head])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(who == COMPUTE)
            def _():
                plgpu.set_max_registers(tile.COPY_REGISTERS, action="decrease")

                def fetch(i, reuse):
                    slot, head = lax.rem(i, ring.slots), kv_head * group + lax.div(i, count)
                    queries = pl.ds(table[row, block, lax.rem(i, count)] * ring.size, ring.size)
                    reuse(q_free)
                    for source, place in (
                        (q.at[batch_row, queries, head], q_ring),
                        (stats.at[batch_row, head, :, queries], stats_ring),
                        (numbers.at[row, :, queries], number_ring),
                    ):
                        plgpu.copy_gmem_to_smem(source, place.at[slot], q_full.at[slot])
                    reuse(d_out_free)
                    source = d_out.at[batch_row, queries, head]
                    plgpu.copy_gmem_to_smem(source, d_out_ring.at[slot], d_out_full.at[slot])

                tile.copy_ahead(count * group, ring.slots, fetch, (q_free, d_out_free))

        slots = ring.slots
        pl.run_scoped(
            both,
            (
                plgpu.SMEM((COMPUTE, ROWS, width), k.dtype),
                plgpu.SMEM((COMPUTE, ROWS, v_width), v.dtype),
                None if ids is None else plgpu.SMEM((COMPUTE, ids.shape[1], ROWS), jnp.int32),
            ),
            (
                plgpu.SMEM((slots, ring.size, width), q.dtype),
                plgpu.SMEM((slots, ring.size, v_width), q.dtype),
                plgpu.SMEM((slots, 2, ring.size), jnp.float32),
                plgpu.SMEM((slots, numbers.shape[1], ring.size), jnp.int32),
            ),
            plgpu.Barrier(num_arrivals=2 if ids is None else 3, num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
            collective_axes="warpgroup",
        )

    outputs = [jax.ShapeDtypeStruct((batch, num_keys, num_kv_heads, widths[name]), k.dtype) for name in sums]
    arguments = q, k, v, d_out, stats, plan.table, plan.counts, numbers, *(() if ids is None else (ids,))
    return tile.run(
        attention_backward_keys, arguments, outputs, {"batch": batch, "block": blocks, "head": num_kv_heads}
    )
