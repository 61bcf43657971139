"""`vishwamai convert from-hf SRC DST`: a Hugging Face checkpoint as a folder that our own tools open."""

import json
import shutil
from pathlib import Path

import yaml

from vishwamai.checkpoint import save_deferred
from vishwamai.checkpoint.arrays import brief
from vishwamai.config import ConfigError
from vishwamai.convert.folder import CARRIED, NAMES, beside_weights, fresh_folder
from vishwamai.convert.source import Published, open_source
from vishwamai.tokenizer import TOKENIZER_FILES


def from_hf(source: str | Path, destination: str | Path) -> Published:
    """Reads a Hugging Face folder or id and writes `destination`, bit for bit and in the types of the source.

    A part of one layer's array is in memory at a time.

    `destination` gets config.yaml (family and model), checkpoints/0, tokenizer/, and in source/ every file beside the
    weights as it was, from which `to_hf` makes the same folder again. Returns what was read.

    Raises:
        ConfigError: `destination` is not empty or can't be written, or the source can't be read (see `open_source`).
    """
    opened = open_source(source)
    if not isinstance(opened, Published):
        raise ConfigError(f"{opened.folder} is a run already, expected a Hugging Face folder (config.json)")
    with fresh_folder(destination) as folder:
        config = {"family": opened.family.name, "model": opened.config.model_dump(mode="json")}
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        _carry(opened, folder / CARRIED)
        tokenizer = [path for pattern in TOKENIZER_FILES for path in sorted(opened.folder.glob(pattern))]
        for path in tokenizer:
            (folder / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "tokenizer" / path.name)
        arrays = opened.arrays
        try:
            save_deferred(folder, arrays)
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that it is not on disk
            raise ConfigError(f"{destination} could not be written: {brief(error)}") from error
    return opened


def _carry(opened: Published, folder: Path) -> None:
    """Copies every file beside the weights, and notes how the weights' names were spelled."""
    folder.mkdir()
    for path in beside_weights(opened.folder):
        shutil.copyfile(path, folder / path.name)
    names = {"naming": opened.naming.name, "repeated": opened.repeated}
    (folder / NAMES).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
