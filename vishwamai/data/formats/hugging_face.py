"""Folders of Hugging Face datasets: what `save_to_disk` writes, and folders as on the hub."""

import json
import re
from pathlib import Path

import pyarrow as pa

from vishwamai.data.formats import Texts, no_field, text_of
from vishwamai.data.formats.jsonl import JsonlTexts
from vishwamai.data.formats.parquet import ParquetTexts
from vishwamai.data.sources import DataError, stamp

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_READERS = {".parquet": ParquetTexts, ".jsonl": JsonlTexts}
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


class ArrowTexts:
    """One column of an Arrow stream, memory-mapped. Raises DataError for a file that is none, or has no such column."""

    def __init__(self, path: Path, field: str):
        self._path, self._field = path, field
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not an Arrow stream: {error}") from None
        if field not in table.column_names:
            raise no_field(str(path), field, table.column_names)
        self._column = table.column(field)
        self.fingerprint = [field, stamp(path)]

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> str:
        return text_of(self._column[index].as_py(), self._field, self.where(index))

    def where(self, index: int) -> str:
        return f"{self._path} row {index}"


def open_folder(folder: Path, split: str | None, field: str) -> list[Texts]:
    """The files of a split (None: train, where there are several). Raises DataError where there is none."""
    if (folder / _SPLITS).is_file():
        splits = _json(folder / _SPLITS, "splits")
        if (split or "train") not in splits:
            raise _no_split(folder, split, splits)
        return _saved(folder / (split or "train"), field)
    if (folder / _STATE).is_file():
        own = _json(folder / _STATE, "_split")
        if split not in (None, own):
            raise _no_split(folder, split, [own] if own else [])
        return _saved(folder, field)
    files = _data_files(folder)
    if not files:
        raise DataError(
            f"{folder} is no Hugging Face dataset: expected {_STATE} or {_SPLITS} (what save_to_disk writes), or "
            "files that end in .parquet or .jsonl"
        )
    chosen = [path for path in files if _names(path.relative_to(folder), split or "train")]
    if split is None and not any(_names(path.relative_to(folder), name) for name in _SPLIT_NAMES for path in files):
        chosen = files  # as `load_dataset`: where no name says a split, all is train
    if not chosen:
        there = ", ".join(path.name for path in files[:5])
        raise DataError(f"{folder} has no files of the split {split or 'train'}, it has {there}: set split")
    return [_READERS[path.suffix](path, field) for path in chosen]


def _names(path: Path, split: str) -> bool:
    """Whether the file's or a folder's name holds the split's: train-00000-of-00002.parquet, data/train/0.jsonl."""
    return re.search(rf"(?<![a-zA-Z]){re.escape(split)}(?![a-zA-Z])", path.with_suffix("").as_posix()) is not None


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in _READERS and path.is_file())


def _saved(folder: Path, field: str) -> list[Texts]:
    files = [folder / entry["filename"] for entry in _json(folder / _STATE, "_data_files")]
    return [ArrowTexts(path, field) for path in files]


def _json(path: Path, key: str):
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what save_to_disk writes: {error!r}") from None


def _no_split(folder: Path, split: str | None, there: list[str]) -> DataError:
    return DataError(
        f"{folder} has no split {split or 'train'!r}, it has {', '.join(there) or 'no named one'}: set split"
    )
