"""Block sizes that fit the chip's memory, with little waste where one group ends and the next begins."""

from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu

ALIGNMENT = 16  # rows: what a register of bfloat16 holds
LARGEST = 1024  # rows in memory at once: fewer steps, but more to wait for before the first
UNROLLED = 2**29  # multiplications of a product that is written out: compile time grows with them


class Chip(NamedTuple):
    matrix_unit: int  # its width: products of fewer rows leave it waiting for matrices
    memory: int  # bytes of VMEM
    cores: int  # that share one program


def this_chip() -> Chip:
    info = pltpu.get_tpu_info()
    return Chip(info.mxu_column_size, info.vmem_capacity_bytes, info.num_cores)


class Tiles(NamedTuple):
    rows: int  # read at once
    product: int  # rows of one product; what is left over takes half of that if it fits
    inner: int
    columns: int
    part: int  # of the columns (of an outer product: of the inner ones) that one product takes


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _row_tiles(rows: int, groups: int, chip: Chip) -> tuple[list[int], int]:
    """Tiles to try, and the rows of a product: its half is at most a quarter of the average group."""
    product = 2 * ALIGNMENT
    while product < chip.matrix_unit and 4 * product <= rows // groups:
        product *= 2
    tiles = [min(tile, round_up(rows, product)) for tile in (LARGEST, LARGEST // 2, LARGEST // 4)]
    return tiles, product


def _splits(width: int, chip: Chip, fewest: int = 1) -> list[int]:
    """Widths of equal parts, the widest first: everything, or multiples of what a matrix unit is wide."""
    parts, unit = [width] if fewest == 1 else [], max(chip.matrix_unit, 128)
    return parts + [round_up(-(-width // n), unit) for n in range(max(2, fewest), -(-width // unit) + 1)] or [width]


def _fewest(width: int, chip: Chip) -> int:
    """One part for each core, where there is enough for all."""
    return chip.cores if width >= 256 * chip.cores else 1


def _part(width: int, others: int, chip: Chip) -> int:
    """The widest of equal parts whose product is not too long a program; all where there are no equal ones."""
    parts = [width // n for n in range(1, width // chip.matrix_unit + 1) if width % (n * chip.matrix_unit) == 0]
    return next((part for part in parts if part * others <= UNROLLED), parts[-1] if parts else width)


def for_products(
    rows, inner, width, groups, x_bytes, w_bytes, chip: Chip, xs: int = 1, matrices: int = 1, outputs: int = 1
) -> Tiles | None:
    """Tiles of x @ w, w whole if it can be: x is read once for each of its parts. None: nothing fits.

    Of as many x and w, side by side, and of as many results of them.
    """
    tiles, product = _row_tiles(rows, groups, chip)
    for columns in _splits(width, chip, _fewest(width, chip)):
        for tile in tiles:
            widened = matrices * inner * columns * x_bytes if w_bytes != x_bytes else 0
            of_rows = (xs * inner + outputs * columns) * x_bytes
            moved = 2 * (tile * of_rows + matrices * inner * columns * w_bytes)
            if _fits(moved + widened + 2 * matrices * product * columns * 4, chip):
                passes = 6 if x_bytes == 4 else 1  # float32 in pieces of bfloat16
                return Tiles(tile, product, inner, columns, _part(columns, product * inner * passes * matrices, chip))
    return None


def for_outer(rows, left, right, groups, x_bytes, w_bytes, chip: Chip, lefts: int = 1, rights: int = 1) -> Tiles | None:
    """Tiles of a^T b, with the least to read: a is read once for each part of b and the other way round.

    Of as many a and b: one goes with all of the other.
    """
    tiles, product = _row_tiles(rows, groups, chip)
    count = max(lefts, rights)
    pairs = [(a, b) for a in _splits(left, chip, _fewest(left, chip)) for b in _splits(right, chip)]

    def read(pair):
        return -(-left // pair[0]) * right * rights + -(-right // pair[1]) * left * lefts

    for inner, columns in sorted(pairs, key=read):
        for tile in tiles:
            moved = 2 * (tile * (lefts * inner + rights * columns) * x_bytes + count * inner * columns * w_bytes)
            if _fits(moved + (1 + count) * inner * columns * 4, chip):
                passes = 6 if x_bytes == 4 else 1
                part = _part(inner, product * columns * passes * count, chip)
                return Tiles(tile, product, inner, columns, part)
    return None


def _fits(size: int, chip: Chip) -> bool:
    return size <= chip.memory * 5 // 8
