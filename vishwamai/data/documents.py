"""Text documents of every format, by number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Int64
from pydantic import Field, model_validator

from vishwamai.data.formats import Texts
from vishwamai.data.formats.plain import TextFiles
from vishwamai.data.joined import Joined
from vishwamai.data.sources import DataError, SampledConfig, chosen, expand_braces


class Format(StrEnum):
    """How documents are stored."""

    AUTO = "auto"  # by the ending of a file's name, or what lies in a folder
    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    HF = "hf"  # a folder of a Hugging Face dataset
    TFDS = "tfds"
    PYTHON = "python"


_ENDINGS = {".txt": Format.TEXT, ".jsonl": Format.JSONL, ".parquet": Format.PARQUET}
# Fields that belong to some formats only.
_FORMATS_OF = {
    "text_field": (Format.AUTO, Format.JSONL, Format.PARQUET, Format.HF, Format.TFDS),
    "split": (Format.AUTO, Format.HF, Format.TFDS),
    "separator": (Format.AUTO, Format.TEXT),
    "data_dir": (Format.TFDS,),
}


class DocumentsConfig(SampledConfig):
    """A part of the documents that lie in some place, counted over all its files in order."""

    path: str = Field(
        description="file, folder, glob or list as {a,b}.txt; tfds: its name; python: module:attribute, a list of texts"
    )
    format: Format = Field(
        Format.AUTO,
        description="text (a document per file), jsonl, parquet, hf (a folder), tfds, python; auto: by the path",
    )
    text_field: str = Field("text", description="field, column or feature that holds the text")
    split: str | None = Field(None, description="hf and tfds: the split; null: train")
    separator: str | None = Field(
        None, min_length=1, description=r'text: what stands between the documents of a file: "\n\n" is a blank line'
    )
    data_dir: str | None = Field(None, description="tfds: where datasets are built; null: its own default")

    @model_validator(mode="after")
    def _of_the_format(self) -> Self:
        for name, formats in _FORMATS_OF.items():
            # By value: a resolved config says every field.
            if self.format not in formats and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning for format={self.format.value}")
        return self


@dataclass(frozen=True)
class _Part:
    """What one entry takes of its texts."""

    texts: Joined[str]
    taken: Int64[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.taken)


class Documents(Sequence[str]):
    """The documents of several entries behind each other, read when they are asked for.

    `fingerprint` (JSON) is another when the documents are others.
    """

    def __init__(self, parts: Sequence[_Part], fingerprint: list[Any]):
        self._parts, self.fingerprint = Joined(parts), fingerprint

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> str:
        texts, number = self._text(index)
        return texts[number]

    def where(self, index: int) -> str:
        """What errors call a document: its file, and its line or row."""
        texts, number = self._text(index)
        return texts.where(number)

    def _text(self, index: int) -> tuple[Texts, int]:
        """The file that a document lies in, and its number there."""
        number, place = self._parts.place(index)
        part = self._parts.parts[number]
        file, place = part.texts.place(int(part.taken[place]))
        return part.texts.parts[file], place


def open_documents(entries: Sequence[DocumentsConfig], seed: int) -> Documents:
    """The documents of `entries`; `seed` draws random samples.

    Raises DataError for files that are missing, of no known format or damaged, and for an entry without documents.
    """
    parts, fingerprint = [], []
    for entry in entries:
        texts = Joined(_open(entry))
        if not len(texts):
            raise DataError(f"{entry.path} holds no documents")
        parts.append(_Part(texts, chosen(entry.sampling_strategy, len(texts), (seed,), entry.path)))
        fingerprint.append([[file.fingerprint for file in texts.parts], entry.sampling_strategy, seed])
    documents = Documents(parts, fingerprint)
    if not len(documents):
        raise DataError(f"no documents are taken from {', '.join(entry.path for entry in entries)}")
    return documents


def _open(entry: DocumentsConfig) -> list[Texts]:
    # Here, so that a run opens no library that it has no data for.
    if entry.format is Format.TFDS:
        from vishwamai.data.formats.tfds import TfdsTexts

        return [TfdsTexts(entry.path, entry.split or "train", entry.data_dir, entry.text_field)]
    if entry.format is Format.PYTHON:
        from vishwamai.data.formats.python import PythonTexts

        return [PythonTexts(entry.path)]
    found: list[Texts] = []
    plain: list[Path] = []
    for path, kind in (pair for name in expand_braces(entry.path) for pair in _files(name, entry.format)):
        if kind is Format.TEXT:
            plain.append(path)
        elif kind is Format.JSONL:
            from vishwamai.data.formats.jsonl import JsonlTexts

            found.append(JsonlTexts(path, entry.text_field))
        elif kind is Format.PARQUET:
            from vishwamai.data.formats.parquet import ParquetTexts

            found.append(ParquetTexts(path, entry.text_field))
        else:
            from vishwamai.data.formats.hugging_face import open_folder

            found += open_folder(path, entry.split, entry.text_field)
    if entry.separator is not None and not plain:
        raise DataError(f"{entry.path} has no plain text, and only that has a separator")
    return [TextFiles(plain, entry.separator), *found] if plain else found


def _files(path: str, kind: Format) -> Iterator[tuple[Path, Format]]:
    """The files, or the folder of a Hugging Face dataset, that a path without braces names; the format of each."""
    place = Path(path)
    if place.is_dir():
        kind = _format_of(place) if kind is Format.AUTO else kind
        if kind is Format.HF:
            yield place, kind
            return
        files = sorted(file for file in place.rglob("*") if _ENDINGS.get(file.suffix) is kind and file.is_file())
    elif kind is Format.HF:
        raise DataError(f"no folder {path}, and a Hugging Face dataset is one (from the folder {Path.cwd()})")
    else:
        files = [place] if place.exists() or not has_magic(path) else sorted(map(Path, glob(path, recursive=True)))
        files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(f"no {'data' if kind is Format.AUTO else kind} file {path} (from the folder {Path.cwd()})")
    for file in files:
        if kind is Format.AUTO and file.suffix not in _ENDINGS:
            formats = ", ".join(format for format in Format if format is not Format.AUTO)
            raise DataError(f"{file} ends in none of {', '.join(_ENDINGS)}: say its format, one of {formats}")
        yield file, _ENDINGS[file.suffix] if kind is Format.AUTO else kind


def _format_of(folder: Path) -> Format:
    """Text where that is all there is, a Hugging Face dataset otherwise. Raises DataError where it is neither."""
    names = [file.name for file in folder.rglob("*") if file.is_file()]
    if any(name in ("state.json", "dataset_dict.json") or name.endswith((".jsonl", ".parquet")) for name in names):
        return Format.HF
    if any(name.endswith(".txt") for name in names):
        return Format.TEXT
    raise DataError(
        f"{folder} is no dataset: it holds {', '.join(sorted(names)[:3]) or 'nothing'}, expected files that end in "
        f"{', '.join(_ENDINGS)}, or what save_to_disk of Hugging Face datasets writes"
    )
