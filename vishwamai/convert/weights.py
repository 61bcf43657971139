"""Tensors of a Hugging Face folder, one at a time: reading them from one file or many, writing safetensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vishwamai.config import ConfigError
from vishwamai.convert.copying import contiguous
from vishwamai.convert.safetensors_file import open_safetensors
from vishwamai.convert.stored import DTYPES, Stored
from vishwamai.convert.torch_file import open_torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_HEADER_BYTES_PER_TENSOR = 160  # beside its name: dtype, shape and offsets in JSON
# The file, its index, and what opens it; of a folder that holds several the first counts.
_FORMATS: list[tuple[str, str, Callable[[Path], dict[str, Stored]]]] = [
    (SINGLE, INDEX, open_safetensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", open_torch),
]


class Weights(Mapping):
    """The tensors in a folder by name, each a view of its file; `held` says where and what they are.

    Raises:
        ConfigError: no weights there, a file that the index names is missing, one that is damaged or unsafe, or a
            tensor in two of them; when a tensor is read, a type that no parameter can be kept in.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.held: dict[str, Stored] = {}
        single, index, opener = _format(self.folder)
        for path, promised in _files(self.folder, single, index).items():
            found = opener(path)
            if absent := sorted(promised - found.keys()):
                raise ConfigError(f"{path} lacks {_some(absent)}, which {index} promises: fetch the file again")
            if twice := sorted(found.keys() & self.held.keys()):
                other = self.held[twice[0]].file.name
                raise ConfigError(f"{path} holds {_some(twice)}, and so does {other}: which ones count?")
            self.held |= found

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor. Raises ConfigError for one that no parameter can be kept in."""
        stored = self.held[name]
        if stored.dtype not in DTYPES:
            raise ConfigError(
                f"{stored.file}: {name} is {stored.dtype}, expected one of {', '.join(DTYPES)}: "
                "save the model as one of these"
            )
        return DTYPES[stored.dtype]

    def __getitem__(self, name: str) -> np.ndarray:
        self.dtype(name)
        return self.held[name].read()

    def __iter__(self):
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def _format(folder: Path) -> tuple[str, str, Callable[[Path], dict[str, Stored]]]:
    for form in _FORMATS:
        if any((folder / name).is_file() for name in form[:2]):
            return form
    other = sorted(path.name for kind in ("safetensors", "bin", "pth", "gguf") for path in folder.glob(f"*.{kind}"))
    hint = f"found {_some(other)}" if other else "found no weights at all"
    expected = " nor ".join(name for form in _FORMATS for name in form[:2])
    raise ConfigError(f"{folder} has neither {expected}; {hint}. Save the model with Transformers' save_pretrained")


def _files(folder: Path, single: str, index: str) -> dict[Path, set[str]]:
    """Files of a folder with the names that the index promises in each."""
    if not (folder / index).is_file():
        return {folder / single: set()}
    found: dict[Path, set[str]] = {}
    try:
        homes = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        for name, file in homes.items():
            found.setdefault(folder / Path(file).name, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / index} is no index of {single} ({error!r}): fetch the file again") from None
    if missing := sorted(path.name for path in found if not path.is_file()):
        raise ConfigError(f"{folder} lacks {_some(missing)}, which {index} names: fetch the rest of the files")
    return found


def _some(names: list[str], count: int = 5) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


class ShardWriter:
    """Writes tensors into a folder as they come, in files of at most `shard_bytes`, with an index if there are several.

    Nothing is held in memory: a file's header gets room for `tensors` names in front and is filled in at the end
    (the format allows spaces after it). `close` completes the folder.
    """

    def __init__(self, folder: Path, names: list[str], shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        self.shard_bytes = shard_bytes
        room = sum(len(json.dumps(name)) + _HEADER_BYTES_PER_TENSOR for name in names) + _HEADER_BYTES_PER_TENSOR
        self._room = room + -room % 8
        self._shards: list[dict[str, Any]] = []
        self._file = None
        self._written = 0

    def write(self, name: str, array: np.ndarray) -> None:
        """Appends one tensor. Raises TypeError for a dtype that the format has no name for."""
        if str(array.dtype) not in _DTYPES:
            raise TypeError(f"{name} is {array.dtype}; safetensors holds {', '.join(_DTYPES)}")
        if self._file is None or (self._written and self._written + array.nbytes > self.shard_bytes):
            self._next_file()
        # Viewed as bytes: bfloat16 has no buffer of its own in NumPy.
        self._file.write(contiguous(array).reshape(-1).view(np.uint8).data)
        start, self._written = self._written, self._written + array.nbytes
        self._shards[-1][name] = {
            "dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, self._written],
        }  # fmt: skip

    def _next_file(self) -> None:
        self._finish_file()
        self._shards.append({"__metadata__": {"format": "pt"}})
        self._file = open(self._path(len(self._shards)), "wb")  # noqa: SIM115 - closed by _finish_file
        self._file.seek(8 + self._room)

    def _path(self, number: int) -> Path:
        return self.folder / f".shard-{number}"

    def _finish_file(self) -> None:
        if self._file is None:
            return
        header = json.dumps(self._shards[-1], separators=(",", ":")).encode().ljust(self._room)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header)
        self._file.close()
        self._file, self._written = None, 0

    def close(self) -> None:
        """Names the files as Transformers does and writes the index."""
        self._finish_file()
        if len(self._shards) == 1:
            self._path(1).rename(self.folder / SINGLE)
            return
        weight_map, size = {}, 0
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._path(number).rename(self.folder / name)
            tensors = {key: entry for key, entry in shard.items() if key != "__metadata__"}
            weight_map |= dict.fromkeys(tensors, name)
            size += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
