"""What the kernels share: products of the tensor cores, the logits of a tile, and how a block of threads is divided.

A block of threads is three warpgroups: two that compute, each with 64 rows of its own, and one that only copies, ahead
of them, into a ring of slots in shared memory. A slot is full when its copies have arrived, and free again when both
have said so.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.attention.gpu.mosaic.plan import Seen
from kernels.attention.gpu.mosaic.tuning import Ring

LOG2_E = float(np.log2(np.e))
NEVER = 1e30  # a log-sum-exp under which every probability is exactly 0; its negative stands for -inf in differences
ROWS = 64  # of a warpgroup: the height of its matrix instruction
COMPUTE = 2  # warpgroups
# Registers of a thread: (2 * 232 + 40) * 128 of the 65,536 that there are. With more, the first increase never returns.
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40


class Logit(NamedTuple):
    """A logit in base 2 is `factor` times what `of` gives for q · k."""

    scale: float
    softcap: float | None

    @property
    def factor(self) -> float:
        return LOG2_E * (self.scale if self.softcap is None else 1)

    def of(self, product):
        """The product itself, or what the soft cap makes of it."""
        if self.softcap is None:
            return product
        return self.softcap * self._bounded(product)

    def pull(self, weights, product):
        """The weights times d logit / d (q · k), but for the scale."""
        return weights if self.softcap is None else weights * (1 - jnp.square(self._bounded(product)))

    def _bounded(self, product):
        # The hardware's own tanh has 11 bits; its exp2 has 22.
        return 1 - 2 / (jnp.exp2(product * (2 * LOG2_E * self.scale / self.softcap)) + 1)


def product_with_rows(a, b):
    """a · bᵀ in float32, both in shared memory."""

    def multiply(total):
        plgpu.wgmma(total, a, b.transpose((1, 0)))
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(total, a, b):
    """total + a · b in float32; a in registers, b in shared memory."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))


def across(values, shape: tuple[int, int], axis: int):
    """`values` along one axis of a tile, the same along the other."""
    return lax.broadcast_in_dim(values, shape, (axis,))


def visible(seen: Seen, query: Callable, key: Callable, key_start, shape: tuple[int, int], query_axis: int):
    """Bool tile: which pairs are seen. query(i) and key(i) give the i-th of their numbers, as `plan` orders them."""
    column = lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis) + key_start
    numbers = iter(range(1, 5))

    def of_queries(i: int):
        return across(query(i), shape, query_axis)

    allowed = column < of_queries(0)
    if seen.low:
        allowed &= column >= of_queries(next(numbers))
    if seen.prefix:
        allowed |= column < of_queries(next(numbers))
    if seen.blocks:
        allowed |= of_queries(next(numbers)) == across(key(0), shape, 1 - query_axis)
    if seen.segments:
        allowed &= of_queries(next(numbers)) == across(key(int(seen.blocks)), shape, 1 - query_axis)
    return allowed


def each_visit(table, counts, row, block, step: Callable, carry):
    """`step(i, other block, carry)` over the visits of a block; None for the other block where nothing is hidden."""
    plain, count = counts[row, block, 0], counts[row, block, 1]
    carry = lax.fori_loop(0, plain, lambda i, carry: step(i, None, carry), carry)
    return lax.fori_loop(plain, count, lambda i, carry: step(i, table[row, block, i], carry), carry)


def copy_ahead(count, slots: int, fetch: Callable, free):
    """The copying warpgroup's loop: `fetch(i, reuse)` for each of `count` visits, into slot i % slots.

    `reuse(barrier)` waits until that part of the slot is free, if it was used before. At the end all are waited for.
    """

    def one(i, _):
        def reuse(barrier):
            @pl.when(i >= slots)
            def _():
                plgpu.barrier_wait(barrier.at[lax.rem(i, slots)])

        fetch(i, reuse)

    def last(i, _):
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(i, slots)])

    lax.fori_loop(0, count, one, None)
    lax.fori_loop(jnp.maximum(count - slots, 0), count, last, None)


def key_ring(ring: Ring, width: int, v_width: int, ids, dtype):
    """Scratch where keys and values stream: slots of them and of ids, if there are any, and `copy_keys`' barriers."""
    slots = ring.slots
    places = (
        plgpu.SMEM((slots, ring.size, width), dtype),
        plgpu.SMEM((slots, ring.size, v_width), dtype),
        None if ids is None else plgpu.SMEM((slots, ids.shape[1], ring.size), jnp.int32),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=1 if ids is None else 2, num_barriers=slots),
        plgpu.Barrier(num_barriers=slots),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
    )
    return places, barriers


def copy_keys(sources: Callable, count, places, barriers, slots: int):
    """All that the copying warpgroup does there: `sources(i)` are keys, values and ids (or None) of visit i.

    barriers: keys and ids are full, values are, keys and ids are free, values are.
    """
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    (k_ring, v_ring, id_ring), (k_full, v_full, k_free, v_free) = places, barriers

    def fetch(i, reuse):
        slot, (k, v, ids) = lax.rem(i, slots), sources(i)
        reuse(k_free)
        plgpu.copy_gmem_to_smem(k, k_ring.at[slot], k_full.at[slot])
        if ids is not None:
            plgpu.copy_gmem_to_smem(ids, id_ring.at[slot], k_full.at[slot])
        reuse(v_free)
        plgpu.copy_gmem_to_smem(v, v_ring.at[slot], v_full.at[slot])

    copy_ahead(count, slots, fetch, (k_free, v_free))


def run(kernel: Callable, arguments, outputs, grid: dict[str, int]):
    """`kernel` over a grid of named axes, the last one fastest; `warpgroup` says which of the three it is.

    Its function's name is the one that profiles show.
    """
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*arguments)
