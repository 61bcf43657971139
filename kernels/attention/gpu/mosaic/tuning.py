"""Sizes of blocks: the largest that fit a Hopper chip's shared memory and registers. Never timed: there was no GPU."""

from typing import NamedTuple

from kernels.attention.gpu.mosaic.plan import BLOCK

SHARED = 227 * 1024 - 8 * 1024  # bytes of shared memory, but for what rows know of the mask, reductions and barriers
NUMBERS = 4 * 8  # bytes, at most: what the mask says of a key or a query, and a query's statistics
MAX_SLOTS = 4


class Ring(NamedTuple):
    """What streams past a block of 128 that stays: blocks of `size`, of which `slots` are held at once."""

    size: int
    slots: int


def forward(width: int, v_width: int) -> Ring:
    """Keys and values. Head dims are padded ones."""
    # The output takes the queries' place if it can.
    return _ring(width + (v_width if v_width != width else 0), width + v_width, 128 if width <= 128 else 64)


def backward_queries(width: int, v_width: int) -> Ring:
    """Keys and values; queries and d_out stay."""
    return _ring(width + v_width, width + v_width, 128 if width <= 64 else 64)


def backward_keys(width: int, v_width: int) -> Ring:
    """Queries and d_out; keys and values stay."""
    return _ring(width + v_width, width + v_width, 64)


def sums(width: int, v_width: int) -> tuple[str, ...]:
    """Which sums a pass of `backward_keys` makes: both, where the registers hold them."""
    return ("kv",) if width + v_width <= 256 else ("k", "v")


def _ring(stays: int, streams: int, size: int) -> Ring:
    """As many slots as fit beside what stays; both in elements of 2 bytes for each of their rows. A head dim of 256
    leaves the backward one slot, so that its copies are waited for: the matrix instruction takes no block below 64.
    """
    slots = (SHARED - 2 * BLOCK * stays) // (size * (2 * streams + NUMBERS))
    return Ring(size, min(slots, MAX_SLOTS))
