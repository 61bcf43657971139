"""Files of conversations -> records: JSON, JSONL, brace lists, YAML mixes, and what part of each is taken."""

import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from vishwamai.config import Config, ConfigError, read_yaml, validate

_STRATEGY = re.compile(r"all|(first|end|random):\d+|((first|end|random):)?\d+(\.\d+)?%")


class DataError(ValueError):
    """Data that can't be learned from; the message says the file, the line or id, and what was found."""


class SampledConfig(Config):
    """A part of some data."""

    sampling_strategy: str = Field(
        "all", description="all, first:N, end:N, random:N or N%; N may be a share: first:10%"
    )

    @field_validator("sampling_strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if not _STRATEGY.fullmatch(value):
            raise ValueError("expected all, first:N, end:N, random:N or N%; N may be a share: first:10%")
        return value


class FilesConfig(SampledConfig):
    """A part of one or several files of conversations."""

    json_path: str = Field(description=".json or .jsonl, a list as /path/{a,b}.json, or a .yaml mix of such")


@dataclass(frozen=True)
class Record:
    """One object of the file `path`, which `files` named; `where` is what errors call it."""

    data: dict[str, Any]
    where: str
    path: Path
    files: FilesConfig


def stamp(path: Path) -> list[str | int]:
    """What of a file changes when its content does: path, size, time."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def chosen(strategy: str, count: int, seed: Sequence[int], where: str) -> np.ndarray:
    """Which of `count` records are taken, ascending; shares are rounded up, a bare `N%` is a random one.

    Raises DataError when more are asked for than there are.
    """
    if strategy == "all":
        return np.arange(count)
    part, _, amount = strategy.rpartition(":")
    # As a fraction: 0.07% of 10,000 are 7, in floats they would be 8.
    taken = math.ceil(Fraction(amount[:-1]) * count / 100) if amount.endswith("%") else int(amount)
    if taken > count:
        raise DataError(f"{where} holds {count} examples, sampling_strategy {strategy} asks for more: say all")
    if part == "first":
        return np.arange(taken)
    if part == "end":
        return np.arange(count - taken, count)
    return np.sort(np.random.default_rng([*seed, count]).permutation(count)[:taken])


def expand_braces(path: str) -> list[str]:
    """`/path/{a,b}.json` -> its paths; several braces multiply."""
    found = re.search(r"\{([^{}]*)\}", path)
    if not found:
        return [path]
    options = (path[: found.start()] + option.strip() + path[found.end() :] for option in found[1].split(","))
    return [expanded for option in options for expanded in expand_braces(option)]


class JsonLines:
    """A .jsonl file by line; only the places of its lines are held in memory."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb")
        ranges, lines, at = [], [], 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                ranges.append((at, at + len(line)))
                lines.append(number)
            at += len(line)
        self._ranges, self._lines = np.asarray(ranges, np.int64).reshape(-1, 2), np.asarray(lines, np.int32)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        start, end = (int(at) for at in self._ranges[index])
        # pread: threads share the file without sharing its position.
        raw = os.pread(self._file.fileno(), end - start, start)
        return _parsed(raw, self.path, int(self._lines[index])), self.where(index)

    def where(self, index: int) -> str:
        """What errors call it."""
        return f"{self.path} line {self._lines[index]}"


class JsonList:
    """A .json file that holds one list."""

    def __init__(self, path: Path):
        self.path = path
        self.items = _parsed(path.read_bytes(), path)
        if not isinstance(self.items, list):
            raise DataError(f"{path} holds {kind_of(self.items)}, expected a list (an object per line is .jsonl)")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        return self.items[index], f"{self.path} item {index}"


class Records(Sequence[Record]):
    """The records of several files behind each other, each file in its own order.

    `schema` is what an entry of a YAML mix may say; what the mix's own config says holds where an entry doesn't.

    Raises:
        ConfigError: a mix that is none.
        DataError: a file is missing, is not JSON (with its line), holds nothing, or a record is no object.
    """

    def __init__(self, files: Sequence[FilesConfig], seed: Sequence[int], schema: type[FilesConfig]):
        self._parts, self.fingerprint = [], []
        for config in (entry for file in files for entry in _flattened(file, schema)):
            path = Path(config.json_path)
            if not path.is_file():
                raise DataError(f"no data file {path} (from the folder {Path.cwd()})")
            source = JsonLines(path) if path.suffix == ".jsonl" else JsonList(path)
            if not len(source):
                raise DataError(f"{path} holds no examples")
            taken = chosen(config.sampling_strategy, len(source), seed, str(path))
            self._parts.append((source, taken, config))
            self.fingerprint.append([*stamp(path), config.model_dump(), seed])
        self._ends = list(accumulate(len(taken) for _, taken, _ in self._parts))
        if not len(self):
            raise DataError(f"no examples are taken from {', '.join(file.json_path for file in files)}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        source, taken, config = self._parts[part]
        data, where = source[int(taken[index - (self._ends[part] - len(taken))])]
        if not isinstance(data, dict):
            raise DataError(f"{where} is {kind_of(data)}, expected an object with `conversations` or `messages`")
        return Record(data, f"{where} (id {data['id']})" if "id" in data else where, source.path, config)


def _flattened(config: FilesConfig, schema: type[FilesConfig], inside: tuple[str, ...] = ()) -> Iterator[FilesConfig]:
    """One entry per file: braces expanded, mixes read. Paths start from the working folder, as a config's."""
    said = config.model_fields_set - {"json_path"}
    shared = {name: getattr(config, name) for name in schema.model_fields if name in said}
    for path in expand_braces(config.json_path):
        if Path(path).suffix not in (".yaml", ".yml"):
            yield schema.model_validate({**shared, "json_path": path})
            continue
        if path in inside:
            raise ConfigError(f"the mix {path} names itself: {' -> '.join([*inside, path])}")
        mix = read_yaml(path)
        if list(mix) != ["datasets"] or not isinstance(mix["datasets"], list):
            raise ConfigError(f"{path} has the keys {', '.join(map(str, mix))}, expected `datasets:` and a list")
        for number, entry in enumerate(mix["datasets"]):
            if not isinstance(entry, dict):
                raise ConfigError(f"{path}: datasets.{number} is {kind_of(entry)}, expected json_path and more")
            inner = validate(schema, {**shared, **entry}, f"{path}: datasets.{number}")
            yield from _flattened(inner, schema, (*inside, path))


def _parsed(raw: bytes, path: Path, line: int | None = None) -> Any:
    """The JSON in a file, or in one line of it."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = line or error.lineno
        raise DataError(f"{path} line {line} is not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        line = line or raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path} line {line} is not UTF-8: byte {error.object[error.start]:#04x}") from None


def kind_of(value: Any) -> str:
    """What errors call a value of JSON."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
