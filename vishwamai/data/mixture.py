"""Streams of rows mixed by weight: which stream a row comes from is a pure function of its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from vishwamai.data.batch import Batch
from vishwamai.data.packing import Capacity, Example, collate


class RowStream(Protocol):
    """An endless stream of rows, each a list of examples that share it."""

    def row(self, index: int) -> list[Example]:
        """Row 0, 1, 2, ...: the same at every call."""
        ...


def assign(weights: Sequence[Fraction], row: int) -> tuple[int, int]:
    """(stream, its row) that global row number `row` shows.

    Every stream's rows come in order and none is left out. Of the first n rows a stream has its share,
    give or take one row per stream: the first takes its share of all, the second its share of the rest, and so on.
    """
    rest = sum(weights)
    for stream, weight in enumerate(weights):
        share = Fraction(weight) / rest
        before = row * share.numerator // share.denominator
        if (row + 1) * share.numerator // share.denominator > before:
            return stream, before
        row -= before
        rest -= weight
    raise ValueError(f"weights {[str(weight) for weight in weights]} must be positive")


@dataclass(frozen=True)
class MixedBatches:
    """A BatchSource: rows of several streams in the proportion of `weights`, `batch_size` at a time."""

    streams: tuple[RowStream, ...]
    weights: tuple[float, ...]
    capacity: Capacity
    batch_size: int

    def row(self, index: int) -> list[Example]:
        """The examples of a global row."""
        weights = [Fraction(str(weight)) for weight in self.weights]  # 0.1 is a tenth, as it was written
        stream, own = assign(weights, index)
        return self.streams[stream].row(own)

    def batch(self, step: int) -> Batch:
        """The batch of a step: rows [step * batch_size, (step + 1) * batch_size)."""
        start = step * self.batch_size
        return collate([self.row(start + i) for i in range(self.batch_size)], self.capacity)
