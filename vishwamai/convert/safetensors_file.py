"""safetensors files as they lie on disk: 8 bytes for the length of a JSON header, the header, the tensors' bytes.

Read here and not by the library's `safe_open` because that keeps a file mapped as long as it is open, so that a process
ends up holding the whole file beside its parameters, and because it says of a damaged file neither which nor where.
https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vishwamai.config import ConfigError
from vishwamai.convert.stored import DTYPES, Stored

LONGEST_HEADER = 100_000_000  # bytes; the library's own bound


@dataclass(frozen=True)
class _Entry:
    """What a header says of a tensor; its bytes are `start` to `stop` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; reads its header.

    Raises ConfigError for a file that is damaged or cut short, with the byte where it ends and what should be there.
    """
    size = path.stat().st_size
    try:
        entries = _entries(path, size)
        _check(entries, size)
    except ValueError as problem:
        raise ConfigError(
            f"{path} ({size:,} bytes) is damaged or cut short ({problem}): fetch the file again"
        ) from None
    return {entry.name: Stored(path, entry.shape, entry.dtype, partial(_read, path, entry)) for entry in entries}


def _read(path: Path, entry: _Entry) -> np.ndarray:
    dtype = DTYPES[entry.dtype]
    if entry.start == entry.stop:
        return np.empty(entry.shape, dtype)  # what is empty can't be mapped
    # Mapped alone: its pages leave the process with the array.
    return np.asarray(np.memmap(path, dtype, "r", entry.start, entry.shape))


def _entries(path: Path, size: int) -> list[_Entry]:
    """The header's entries in the order of the file. Raises ValueError for what is no header."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"it ends at byte {size}, and 8 bytes should say how long its header is")
        length = int.from_bytes(start, "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"its first 8 bytes, {start!r}, are no length of a header")
        if 8 + length > size:
            raise ValueError(f"it ends at byte {size:,}, and its header at byte {8 + length:,}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON from byte {8 + error.pos:,} on: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"its header is no text from byte {8 + error.start:,} on") from None
    if not isinstance(header, Mapping):
        raise ValueError(f"its header is {type(header).__name__}, not an object")
    found = [_entry(name, held, 8 + length) for name, held in header.items() if name != "__metadata__"]
    return sorted(found, key=lambda entry: (entry.start, entry.stop))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header says twice: {next(name for name in names if names.count(name) > 1)}")
    return found


def _entry(name: str, held: Any, data: int) -> _Entry:
    match held:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if _counts(shape):
            return _Entry(name, dtype, tuple(shape), data + start, data + stop)
    raise ValueError(f"its header has no dtype, shape and data_offsets for {name}: {held!r:.100}")


def _counts(numbers: Iterable[Any]) -> bool:
    return all(isinstance(number, int) and number >= 0 for number in numbers)


def _check(entries: list[_Entry], size: int) -> None:
    """Raises ValueError unless each tensor has the bytes that it needs, and all together are the file."""
    for entry in entries:
        width = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        if width and entry.stop - entry.start != math.prod(entry.shape) * width:
            raise ValueError(
                f"{entry.name}, {entry.dtype} {list(entry.shape)}, needs {math.prod(entry.shape) * width:,} bytes, "
                f"and its place is byte {entry.start:,} to {entry.stop:,}"
            )
    for before, entry in zip(entries, entries[1:], strict=False):
        if entry.start != before.stop:
            raise ValueError(
                f"{before.name} ends at byte {before.stop:,}, and {entry.name}, the next one, begins at {entry.start:,}"
            )
    if cut := [entry for entry in entries if entry.stop > size]:
        more = f"; so are the {len(cut) - 1} tensors behind it" if len(cut) > 1 else ""
        raise ValueError(
            f"it ends at byte {size:,}, and {cut[0].name} is byte {cut[0].start:,} to {cut[0].stop:,}{more}"
        )
    if entries and entries[-1].stop < size:
        raise ValueError(f"{entries[-1].name}, its last tensor, ends at byte {entries[-1].stop:,}, {size:,} are there")
