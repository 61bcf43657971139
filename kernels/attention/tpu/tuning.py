"""Sizes of blocks and tiles, per chip and shape."""

from typing import NamedTuple


GRADIENT_BYTES = 24 * 2**20  # for two copies of d_k and d_v in a backward kernel


class Sizes(NamedTuple):
    """A step of the grid works on `heads` heads, `queries` times `keys`, in tiles of `tile_queries` times `tile_keys`.

    heads: of the forward kernel; the more, the less of it waits for the first product and for the last.
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


def forward(q, k, v, mask) -> Sizes:
    return Sizes(1024, 1024, 512, 512)


def backward(q, k, v, mask) -> Sizes:
    return Sizes(1024, 1024, 512, 512)


def pieces(extent, width: int) -> list:
    """The plane in pieces of keys whose float32 gradients, `width` numbers a key, fit into fast memory."""
    size = max(GRADIENT_BYTES // (8 * width) // extent.block_keys, 1) * extent.block_keys
    starts = range(0, extent.num_keys, size)
    return [extent._replace(first_key=start, num_keys=min(start + size, extent.num_keys)) for start in starts]
