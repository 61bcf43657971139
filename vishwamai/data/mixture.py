"""Streams of rows mixed by weight: which stream a row comes from is a pure function of its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from vishwamai.data.batch import Batch
from vishwamai.data.packing import Capacity, Example, collate


def all_or_none(datasets: Sequence[Any]) -> None:
    """Raises ValueError where some of `datasets` have a `weight` and others don't."""
    weighted = [dataset.weight is not None for dataset in datasets]
    if any(weighted) and not all(weighted):
        raise ValueError("either every dataset has a weight or none has")


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


def rows_of(weights: Sequence[Fraction], rows: int) -> list[int]:
    """How many of the first `rows` global rows each stream shows, as `assign` deals them out."""
    rest, counts = sum(weights), []
    for weight in weights:
        share = Fraction(weight) / rest
        counts.append(rows * share.numerator // share.denominator)
        rows -= counts[-1]
        rest -= weight
    return counts


@dataclass(frozen=True)
class MixedBatches:
    """A BatchSource: rows of several streams in the proportion of `weights`, `batch_size` at a time.

    `names`: for each stream those of the datasets whose tokens it counts (`PackedPool.tokens`); none, and the mixture
    is not told.
    """

    streams: tuple[RowStream, ...]
    weights: tuple[float, ...]
    capacity: Capacity
    batch_size: int
    names: tuple[tuple[str, ...], ...] = ()

    def row(self, index: int) -> list[Example]:
        """The examples of a global row."""
        stream, own = assign(self._fractions, index)
        return self.streams[stream].row(own)

    def batch(self, step: int) -> Batch:
        """The batch of a step: rows [step * batch_size, (step + 1) * batch_size)."""
        start = step * self.batch_size
        return collate([self.row(start + i) for i in range(self.batch_size)], self.capacity)

    def mixture(self, start: int, stop: int) -> dict[str, float]:
        """The share of each dataset in the tokens of the batches [start, stop), from the plan: nothing is loaded."""
        if not self.names:
            return {}
        before = rows_of(self._fractions, start * self.batch_size)
        after = rows_of(self._fractions, stop * self.batch_size)
        tokens: dict[str, int] = {}
        for names, stream, first, end in zip(self.names, self.streams, before, after, strict=True):
            tokens |= zip(names, stream.tokens(first, end).tolist(), strict=True)
        total = sum(tokens.values())
        return {name: count / total for name, count in tokens.items()}

    @property
    def _fractions(self) -> list[Fraction]:
        return [Fraction(str(weight)) for weight in self.weights]  # 0.1 is a tenth, as it was written
