"""Tensors of a Hugging Face folder, one at a time: reading safetensors (with an index too) and writing them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vishwamai.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_READ = ("F32", "BF16", "F16")  # what parameters can be kept in: JAX would round F64 to F32
_HEADER_BYTES_PER_TENSOR = 160  # beside its name: dtype, shape and offsets in JSON


class Weights(Mapping):
    """The tensors in a folder by name; each is read when it is asked for.

    Raises:
        ConfigError: no safetensors there, a shard that the index names is missing, or a file that is damaged; when a
            tensor is read, a type that no parameter can be kept in.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._home = {}
        for path, promised in _shards(self.folder).items():
            file = _open(path)
            names = set(file.keys())
            if absent := sorted((promised or names) - names):
                raise ConfigError(f"{path} lacks {_some(absent)}, which {INDEX} promises: fetch the file again")
            self._home |= dict.fromkeys(promised or names, file)

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._home[name]
        if (dtype := file.get_slice(name).get_dtype()) not in _READ:
            raise ConfigError(
                f"{self.folder}: {name} is {dtype}, expected one of {', '.join(_READ)}: save the model as one of these"
            )
        return file.get_tensor(name)

    def __iter__(self):
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Files of a folder with the names that the index promises in each (None without an index)."""
    if (folder / INDEX).is_file():
        try:
            homes = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            found = {}
            for name, file in homes.items():
                found.setdefault(folder / Path(file).name, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{folder / INDEX} is no index of safetensors ({error!r}): fetch the file again"
            ) from None
        if missing := sorted(path.name for path in found if not path.is_file()):
            raise ConfigError(f"{folder} lacks {_some(missing)}, which {INDEX} names: fetch the rest of the files")
        return found
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    other += sorted(path.name for path in folder.glob("*.bin"))
    hint = f"found {_some(other)}" if other else "found no weights at all"
    raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}; {hint}. Save the model as safetensors first")


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ConfigError(f"{path} ({size:,} bytes) is damaged or cut short ({error}): fetch the file again") from None


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
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
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
