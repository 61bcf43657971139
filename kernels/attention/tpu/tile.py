"""What forward and backward kernel share: a tile's logits, which of them are seen, what is asked of the compiler.

Logits stand keys by queries (S^T = K Q^T). So maxima and sums over keys go down the sublanes, which takes additions of
registers and no moves across lanes, a query's statistics are one row that broadcasts for free, and the products with V
and of the gradients have 128 or fewer rows against a square of probabilities that fills matrix units of 256 columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu.blocks import DIAGONAL, FULL
from kernels.attention.tpu.tuning import Sizes
from kernels.precision import precision

LANES = 128
LOG2_E = 1.4426950408889634
HIDDEN = -2e30  # a logit that is not seen; below any real one
LOWEST = -1e30  # where a running maximum starts: between both, so that a row without keys sums to exactly 0
NEVER = 1e30  # a log-sum-exp under which every probability is exactly 0
MAX_LOGIT = 50.0  # weights of e^-50 to e^50: float32 holds their sums over 2^20 keys, with values up to 2^34
VMEM_BYTES = 56 * 2**20  # of 64 MiB on v5p and tpu7x


class Logit(NamedTuple):
    """logit · log2(e) = z · factor, with z = q·k, or tanh(q·k · inner) under a soft cap."""

    factor: float
    inner: float | None

    @classmethod
    def of(cls, scale: float, softcap: float | None) -> "Logit":
        return cls(scale * LOG2_E, None) if softcap is None else cls(softcap * LOG2_E, scale / softcap)

    def bound(self, products):
        return products if self.inner is None else jnp.tanh(products * self.inner)


class Seen(NamedTuple):
    """Static: what of a mask the kernel has to compute."""

    causal: bool
    window: int | None
    prefix: bool
    segments: bool
    block_ids: bool
    length: bool


class Place(NamedTuple):
    """Where a block lies: its kind, first query and key, and its row's q_offset, prefix_length and kv_length."""

    kind: int
    q_start: jax.Array
    k_start: jax.Array
    offset: jax.Array
    prefix: jax.Array
    length: jax.Array


class Maps(NamedTuple):
    """Index maps of the blocks that a visit needs: of `B N H T`, `B K S H`, `B K H S`, `B R T` and `B R S`."""

    queries: Callable
    keys: Callable
    key_columns: Callable
    query_ids: Callable
    key_ids: Callable

    @classmethod
    def of(cls, lists: int, kv_head: Callable) -> "Maps":
        """lists: 1, or one a row of the batch. kv_head: key head's block of a query head's block."""

        def query(b, step, table):
            return table[b if lists > 1 else 0, step] >> 16

        def key(b, step, table):
            return (table[b if lists > 1 else 0, step] >> 4) & 0xFFF

        return cls(
            lambda b, n, step, table, *_: (b, n, 0, query(b, step, table)),
            lambda b, n, step, table, *_: (b, kv_head(n), key(b, step, table), 0),
            lambda b, n, step, table, *_: (b, kv_head(n), 0, key(b, step, table)),
            lambda b, n, step, table, *_: (b, 0, query(b, step, table)),
            lambda b, n, step, table, *_: (b, 0, key(b, step, table)),
        )


def tiles(sizes: Sizes, kind: int) -> list[tuple[int, int, int, int]]:
    """(first query, queries, first key, keys) of a block's tiles; on the diagonal only of those that see something."""
    height = min(sizes.tile_keys, sizes.diagonal_keys) if kind == DIAGONAL else sizes.tile_keys
    found = []
    for q in range(0, sizes.queries, sizes.tile_queries):
        for k in range(0, sizes.keys, height):
            begin = max(q, k) if kind == DIAGONAL else q  # queries before a tile's first key see nothing of it
            if begin < q + sizes.tile_queries:
                found.append((begin, q + sizes.tile_queries - begin, k, height))
    return found


def visible(seen: Seen, place: Place, tile, q_ids, k_ids):
    """Bool keys by queries for a tile of a block, None where all is seen.

    q_ids, k_ids: refs of int32 `rows queries` and `rows keys`, segments and blocks, in that order, if there are any.
    """
    if place.kind == FULL:
        return None
    q, width, k, height = tile
    query = place.q_start + place.offset + q  # of column 0
    key = place.k_start + k  # of row 0
    rows = lax.broadcasted_iota(jnp.int32, (height, width), 0)
    allowed = None
    # On the diagonal a tile whose last key is not behind its first query is cut by nothing.
    if seen.causal and not (place.kind == DIAGONAL and k + height - 1 <= q):
        ahead = rows - lax.broadcasted_iota(jnp.int32, (height, width), 1)
        allowed = ahead <= query - key
        if seen.window is not None and place.kind != DIAGONAL:
            allowed &= ahead > query - key - seen.window
        if seen.prefix:
            allowed |= rows < place.prefix - key
    if seen.block_ids:
        allowed |= _column(k_ids[-1:, k : k + height], width) == q_ids[-1:, q : q + width]
    if seen.segments:
        same = _column(k_ids[:1, k : k + height], width) == q_ids[:1, q : q + width]
        allowed = same if allowed is None else allowed & same
    if seen.length:
        there = rows < place.length - key
        allowed = there if allowed is None else allowed & there
    return allowed


def _column(row, width: int):
    """A row `1 C` as `C width`."""
    column = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return jnp.concatenate([column] * (width // LANES), axis=1)


def dot(a, b, contract: tuple[int, int]):
    """In float32."""
    dimensions = (contract[:1], contract[1:]), ((), ())
    return lax.dot_general(a, b, dimensions, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def compiler_params(sizes: Sizes, semantics: tuple[str, ...]) -> pltpu.CompilerParams:
    flags = {"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True} if sizes.lp_scheduler else None
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES, flags=flags)
