"""Sizes of blocks and tiles, per chip and shape: a table filled from the compiler's own schedules."""

from typing import NamedTuple

import jax

from kernels.attention.mask import Mask

LANES = 128
GRADIENT_BYTES = 24 * 2**20  # for two copies of d_k and d_v in a backward kernel


class Sizes(NamedTuple):
    """A step of the grid works on `heads` heads, `queries` times `keys`, in tiles of `tile_queries` times `tile_keys`.

    heads: of the forward kernel; the more, the less of it waits for the first product and for the last. In float32
        half as many: its products are six, and programs of four heads take the compiler many minutes.
    diagonal_keys: keys of a tile on the diagonal, where small tiles leave more of the hidden half out.
    lp_scheduler: the compiler's scheduler by linear programming.
    """

    queries: int
    keys: int
    tile_queries: int
    tile_keys: int
    heads: int = 1
    diagonal_keys: int = 256
    lp_scheduler: bool = True


# Per kernel and class of mask: "whole" (full, causal), "pieces" (segments or short windows: small blocks skip more).
DEFAULT = {
    ("forward", "whole"): Sizes(1024, 1024, 512, 512, heads=4),
    ("forward", "pieces"): Sizes(512, 512, 512, 512, heads=4),
    ("backward", "whole"): Sizes(1024, 1024, 512, 512),
    ("backward", "pieces"): Sizes(512, 512, 512, 512),
}
# What differs on a chip, by the start of its device_kind. With 128 columns the matrix units bound one head already.
CHIPS = {"TPU v5": {("forward", "whole"): Sizes(1024, 1024, 512, 512)}}
LONG = 16 * 1024  # rows of which no part needs small blocks


def forward(q, k, v, mask: Mask) -> Sizes:
    """Sizes for q `B T N H`, k `B S K H`, v `B S K V`; blocks of short rows are as long as the row."""
    return _fit("forward", q, k, mask)


def backward(q, k, v, mask: Mask) -> Sizes:
    """As `forward`, for the backward kernel, which takes one head at a time."""
    return _fit("backward", q, k, mask)


def pieces(extent, width: int) -> list:
    """The plane in even pieces of keys whose float32 gradients, `width` numbers a key, fit into fast memory."""
    most = max(GRADIENT_BYTES // (8 * width) // extent.block_keys, 1)
    blocks = -(-extent.num_keys // extent.block_keys)
    size = -(-blocks // -(-blocks // most)) * extent.block_keys
    starts = range(0, extent.num_keys, size)
    return [extent._replace(first_key=start, num_keys=min(start + size, extent.num_keys)) for start in starts]


def _fit(kernel: str, q, k, mask: Mask) -> Sizes:
    (_, num_queries, num_heads, _), (num_keys, num_kv_heads) = q.shape, k.shape[1:3]
    parts = mask.q_segment_ids is not None or (mask.window is not None and mask.window < 1024)
    key = kernel, "pieces" if parts and max(num_queries, num_keys) <= LONG else "whole"
    best = _chip_table().get(key, DEFAULT[key])
    queries, keys = _block(num_queries, best.queries), _block(num_keys, best.keys)
    group = num_heads // num_kv_heads
    most = best.heads if q.dtype.itemsize < 4 else -(-best.heads // 2)
    heads = next(n for n in range(most, 0, -1) if num_heads % n == 0 and (group % n == 0 or n % group == 0))
    return best._replace(
        queries=queries,
        keys=keys,
        tile_queries=_tile(queries, best.tile_queries),
        tile_keys=_tile(keys, best.tile_keys),
        heads=heads,
    )


def _block(length: int, most: int) -> int:
    """Blocks of even size, as few as possible: 1100 rows are two of 768, not two of 1024."""
    even = -(-length // -(-length // most))
    unit = LANES if even <= 2 * LANES else 2 * LANES
    return -(-even // unit) * unit


def _tile(block: int, most: int) -> int:
    return max(size for size in range(LANES, min(block, most) + 1, LANES) if block % size == 0)


def _chip_table() -> dict:
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return next((table for name, table in CHIPS.items() if kind.startswith(name)), {})
