"""Folders of checkpoints: what lies in them, and how they are written whole or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from vishwamai.config import ConfigError

CARRIED = "source"  # what a converted folder keeps of the checkpoint it was made from
NAMES = "names.json"  # in there: the spelling of the weights' names, and tied weights that were held twice

_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.h5",
    "*.msgpack",
    "*.pth",
    "*.gguf",
)


def beside_weights(folder: Path) -> Iterator[Path]:
    """The files of a Hugging Face folder that hold no weights."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not any(path.match(pattern) for pattern in _WEIGHTS):
            yield path


@contextlib.contextmanager
def fresh_folder(destination: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` at the end; nothing is left behind when something fails.

    Raises ConfigError if there is something at `destination` already, or the disk is full.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination} exists and is not empty: choose another folder, or remove it first")
    partial = destination.absolute().with_name(f".{destination.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ConfigError(f"{destination} could not be written: {error.strerror or error}{where}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
