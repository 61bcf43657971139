"""Plain text: a document per file, or several with a separator between them."""

import mmap
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from vishwamai.data.sources import DataError, stamp

_BREAKS = b"\r\n"


class TextFiles:
    """UTF-8 files; of one document only the places of its first and last byte are in memory.

    `separator`: what stands between the documents of a file; line breaks around it are part of it, and nothing
    between two of them is no document. None: each file is one.
    """

    def __init__(self, paths: Sequence[Path], separator: str | None = None):
        self._paths, self._separator = list(paths), separator
        spans = chain.from_iterable(_spans(number, path, separator) for number, path in enumerate(paths))
        self._spans = np.fromiter(chain.from_iterable(spans), np.int64).reshape(-1, 4)  # file, first byte, end, line
        self.fingerprint = [separator, [stamp(path) for path in paths]]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        number, start, end, line = self._spans[index].tolist()
        path = self._paths[number]
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(end - start)
        try:
            return raw.decode("utf-8" if start else "utf-8-sig")
        except UnicodeDecodeError as error:
            at = line + error.object[: error.start].count(b"\n")
            raise DataError(f"{path} line {at} is not UTF-8: byte {error.object[error.start]:#04x}") from None

    def where(self, index: int) -> str:
        number, _, _, line = self._spans[index].tolist()
        return str(self._paths[number]) if self._separator is None else f"{self._paths[number]} line {line}"


def _spans(number: int, path: Path, separator: str | None) -> Iterator[tuple[int, int, int, int]]:
    size = path.stat().st_size
    if separator is None or not size:
        yield number, 0, size, 1
        return
    between = separator.encode()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start, line = 0, 1
        while start < size:
            found = data.find(between, start)
            end = size if found < 0 else found
            raw = data[start:end]
            text = raw.strip(_BREAKS)
            if text.strip():
                before = raw[: len(raw) - len(raw.lstrip(_BREAKS))]
                first = start + len(before)
                yield number, first, first + len(text), line + before.count(b"\n")
            line += data[start : end + len(between)].count(b"\n")
            start = end + len(between)
