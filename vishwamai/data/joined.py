"""Sequences behind each other, as one."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


class Joined(Sequence[T]):
    """The items of `parts` in order; nothing is copied. `ends[k]` is how many items the parts up to k have."""

    def __init__(self, parts: Sequence[Sequence[T]]):
        self.parts = list(parts)
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> T:
        part, place = self.place(index)
        return self.parts[part][place]

    def place(self, index: int) -> tuple[int, int]:
        """The number of the part that an item lies in, and its own number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part] - len(self.parts[part]))
