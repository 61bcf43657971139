"""A finite pool of examples as an endless stream of packed rows, each example exactly once per epoch.

Packing is planned once from the lengths alone: a fixed shuffle of the pool, first fit within windows of it.
An epoch is then a permutation of the rows, so (epoch, row) of any row number is one division, on resume too.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import Int, Int64

from vishwamai.data.packing import Capacity, Example, first_fit
from vishwamai.data.sources import DataError

WINDOW = 4096
_ROUNDS = 4  # of the cipher behind index_shuffle

logger = logging.getLogger(__name__)


class Named(Protocol):
    """What a pool holds: `where` is what errors call it."""

    @property
    def where(self) -> str: ...


R = TypeVar("R", bound=Named)


class TooLong(StrEnum):
    """What happens to an example that fits no row."""

    ERROR = "error"
    SKIP = "skip"


@dataclass(frozen=True)
class Plan:
    """Which examples share a row: row r holds `order[starts[r] : starts[r + 1]]`."""

    order: Int64[np.ndarray, " N"]
    starts: Int64[np.ndarray, " R+1"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int64[np.ndarray, " n"]:
        return self.order[self.starts[row] : self.starts[row + 1]]


def plan(
    indices: Int[np.ndarray, " N"], lengths: Int[np.ndarray, "M 2"], capacity: Capacity, seed: Sequence[int]
) -> Plan:
    """Packs the examples `indices` of a pool with these (tokens, patches)."""
    shuffled = np.random.default_rng(seed).permutation(np.asarray(indices, np.int64))
    orders, counts = [], []
    for start in range(0, len(shuffled), WINDOW):
        window = shuffled[start : start + WINDOW]
        row_of = first_fit(lengths[window], capacity)
        orders.append(window[np.argsort(row_of, kind="stable")])
        counts.append(np.bincount(row_of))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return Plan(np.concatenate(orders), starts)


def fitting(
    lengths: Int[np.ndarray, "N 2"], capacity: Capacity, too_long: TooLong, where: Callable[[int], str]
) -> Int64[np.ndarray, " n"]:
    """The examples that fit a row. Raises DataError when one doesn't (or, with `skip`, when none does)."""
    fits = (lengths <= (capacity.tokens, capacity.patches)).all(axis=1)
    left_out = np.flatnonzero(~fits)
    if len(left_out):
        tokens, patches = lengths[left_out[0]]
        message = (
            f"{len(left_out)} of {len(lengths)} examples are longer than a row; the first, "
            f"{where(int(left_out[0]))}, needs {tokens:,} tokens and {patches:,} patches, a row holds "
            f"{capacity.tokens:,} and {capacity.patches:,}"
        )
        if too_long is TooLong.ERROR or len(left_out) == len(lengths):
            raise DataError(
                f"{message}: raise data.max_length or data.max_patches, or leave them out: data.too_long=skip"
            )
        logger.warning("%s: they are left out (data.too_long=skip)", message)
    return np.flatnonzero(fits)


class PackedPool:
    """A RowStream over records, of one dataset or of several behind each other: `ends[k]` is where dataset k ends."""

    def __init__(
        self,
        records: Sequence[R],
        lengths: Int[np.ndarray, "N 2"],
        load: Callable[[R], Example],
        capacity: Capacity,
        seed: Sequence[int],
        too_long: TooLong = TooLong.ERROR,
        ends: Sequence[int] | None = None,
    ):
        kept = fitting(lengths, capacity, too_long, lambda index: records[index].where)
        self.skipped = len(lengths) - len(kept)
        self.plan = plan(kept, lengths, capacity, seed)
        self.records, self.lengths, self.load, self.seed = records, lengths, load, seed
        self.ends = np.asarray([len(records)] if ends is None else ends)
        self.tokens_per_epoch = self._count(self.plan.order)  # of each dataset
        logger.info("%s examples in %s rows an epoch, %s left out", len(kept), len(self.plan), self.skipped)

    def row(self, index: int) -> list[Example]:
        """The examples of row `index`, counted over all epochs."""
        return [self._example(int(member)) for member in self._members(index)]

    def tokens(self, start: int, stop: int) -> Int64[np.ndarray, " D"]:
        """How many tokens of rows [start, stop) each dataset gives. Nothing is loaded."""
        rows = len(self.plan)
        first, last = -(-start // rows), stop // rows  # the epochs that lie in between whole
        if first < last:
            ends = self.tokens(start, first * rows) + self.tokens(last * rows, stop)
            return ends + (last - first) * self.tokens_per_epoch
        members = [self._members(row) for row in range(start, stop)]
        return self._count(np.concatenate(members) if members else np.zeros(0, np.int64))

    def _count(self, members: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " D"]:
        datasets = np.searchsorted(self.ends, members, side="right")
        counts = np.zeros(len(self.ends), np.int64)
        np.add.at(counts, datasets, self.lengths[members, 0])
        return counts

    def _members(self, index: int) -> Int64[np.ndarray, " n"]:
        epoch, place = divmod(index, len(self.plan))
        return self.plan[_shuffled(place, len(self.plan), (*self.seed, epoch))]

    def _example(self, member: int) -> Example:
        record = self.records[member]
        example = self.load(record)
        planned = int(self.lengths[member][0])
        if len(example.tokens) != planned:
            raise DataError(
                f"{record.where} has {len(example.tokens)} tokens, {planned} were counted: the file changed"
            )
        return example


@lru_cache(2**14)  # a row's tokens are counted after it was made; and in small pools the cipher takes milliseconds
def _shuffled(place: int, rows: int, seed: tuple[int, ...]) -> int:
    from grain.experimental import index_shuffle  # here, so that opening a model does without grain

    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return index_shuffle(place, max_index=rows - 1, seed=seed, rounds=_ROUNDS)
