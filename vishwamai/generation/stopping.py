"""Where an answer ends: at a token, or where its text comes to hold a string."""

from collections.abc import Callable, Sequence

import numpy as np


def parsed(stop: Sequence[int | str] | str | None, end_ids: Sequence[int]) -> tuple[list[int], list[str]]:
    """(ids, strings) that end an answer; None stands for `end_ids`. Raises ValueError for anything else."""
    if stop is None:
        return list(end_ids), []
    stop = [stop] if isinstance(stop, str) else stop
    for item in stop:
        if not isinstance(item, str | int | np.integer) or isinstance(item, bool) or item == "":
            raise ValueError(f"stop holds {item!r}: expected token ids and strings that are not empty")
    return [int(item) for item in stop if not isinstance(item, str)], [item for item in stop if isinstance(item, str)]


def length_with(
    tokens: np.ndarray, strings: Sequence[str], decode: Callable[[np.ndarray], str], checked: int
) -> int | None:
    """How many tokens it takes until the text holds one of the strings; None where it doesn't.

    `checked`: so many are known to be too few.
    """

    def stops(length: int) -> bool:
        text = decode(tokens[:length])
        return any(string in text for string in strings)

    if not stops(len(tokens)):
        return None
    return next(length for length in range(checked + 1, len(tokens) + 1) if stops(length))
