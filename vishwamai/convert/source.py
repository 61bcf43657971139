"""Where weights come from: a run, one of its checkpoints, a Hugging Face folder, or a hub id."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flax import nnx

from vishwamai import families
from vishwamai.checkpoint import Deferred, latest_step, stored_arrays
from vishwamai.config import ConfigError, read_yaml, validate
from vishwamai.convert.layout import Naming, Row
from vishwamai.convert.parameters import (
    Tensors,
    abstract_parameters,
    check_names,
    deferred_arrays,
    exported_tensors,
    layer_name,
    published_tensors,
    repeated,
)
from vishwamai.convert.placing import place
from vishwamai.convert.weights import Weights
from vishwamai.families import Family

_HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.md",
    "LICENSE*",
)


@dataclass(frozen=True)
class Source:
    """A folder with the weights of a known family, opened but not read."""

    folder: Path
    family: Family
    config: Any

    @cached_property
    def abstract(self) -> nnx.State:
        return abstract_parameters(self.family.build, self.config)

    @cached_property
    def rows(self) -> list[Row]:
        return self.family.layout.rows(self.config)

    def parameters(self, dtype: str, shardings: nnx.State | None = None) -> nnx.State:
        """All parameters in `dtype`, laid out by `shardings` (default: on the first device)."""
        return place(self.arrays, self.abstract, dtype, shardings)


@dataclass(frozen=True)
class Published(Source):
    """A Hugging Face folder."""

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.folder)

    @cached_property
    def naming(self) -> Naming:
        return self.family.layout.naming_of(self.config, self.weights)

    @cached_property
    def tensors(self) -> Tensors:
        return published_tensors(self.weights, self.family.layout, self.config, self.naming)

    @cached_property
    def arrays(self) -> dict[str, Deferred]:
        """Our arrays by name, one per layer, in the types of the files."""
        return deferred_arrays(self.tensors, self.rows, self.abstract)

    @cached_property
    def repeated(self) -> dict[str, str]:
        return repeated(self.weights, self.family.layout, self.config, self.naming)

    def check_names(self) -> None:
        """Raises ConfigError unless the folder holds the tensors that its config asks for; reads none of them."""
        check_names(self.weights, self.family.layout, self.config, self.naming)


@dataclass(frozen=True)
class Run(Source):
    """A training run (or what `convert from-hf` wrote) at one of its checkpoints."""

    step: int

    @cached_property
    def arrays(self) -> dict[str, Deferred]:
        """Our arrays by name, one per layer, in the types that they were saved in."""
        return stored_arrays(self.folder, self.step, self.abstract)

    @cached_property
    def tensors(self) -> Tensors:
        return exported_tensors(str(self.folder), self.rows, lambda *place: self.arrays[layer_name(*place)])


def open_source(place: str | Path) -> Published | Run:
    """Opens a run, `RUN/checkpoints/STEP`, a Hugging Face folder or a hub id.

    Raises:
        ConfigError: nothing there, an architecture that no family reads, a config that our models can't compute, or
            a hub that can't be reached.
    """
    folder = Path(place) if Path(place).is_dir() else download(str(place))
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        return _open_run(folder.parent.parent, int(folder.name))
    if (folder / "config.json").is_file():
        return _open_published(folder)
    if (folder / "config.yaml").is_file():
        return _open_run(folder, None)
    raise ConfigError(f"{folder} is neither a run (config.yaml) nor a Hugging Face folder (config.json)")


def _open_run(folder: Path, step: int | None) -> Run:
    tree = read_yaml(folder / "config.yaml")
    if "family" not in tree or "model" not in tree:
        raise ConfigError(f"{folder / 'config.yaml'} has no `family` or no `model`: it is no run's config")
    family = families.get(str(tree["family"]))
    config = validate(family.model_config, tree["model"], f"{folder / 'config.yaml'}, model")
    return Run(folder, family, config, latest_step(folder) if step is None else step)


def _open_published(folder: Path) -> Published:
    try:
        source = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(source, dict) or not source.get("architectures"):
        raise ConfigError(f"{folder / 'config.json'} names no `architectures`: which model is it?")
    family = families.for_architecture(source["architectures"][0])
    if "quantization_config" in source:
        raise ConfigError(f"{folder} holds quantised weights: take the checkpoint that they were made from")
    return Published(folder, family, family.layout.read_config(source, str(folder / "config.json")))


def download(place: str) -> Path:
    """A folder with the files of a hub id (`owner/name`). Raises ConfigError where that can't be had."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place) or place.startswith("."):
        raise ConfigError(f"no folder {place}, and it is no Hugging Face id (owner/name) either")
    import huggingface_hub  # only needed for a download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(place, allow_patterns=_HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(place, allow_patterns="pytorch_model*.bin")
        return folder
    except GatedRepoError:
        raise ConfigError(
            f"{place} asks for consent at the Hugging Face hub: log in there first (`hf auth login`)"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(f"there is no folder {place}, and no model of that name at the Hugging Face hub") from None
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        why = f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}"
        raise ConfigError(
            f"there is no folder {place}, and the Hugging Face hub can't be reached for a model of that name ({why}): "
            f"check the path, or the network. Without one, fetch it elsewhere (`hf download {place} --local-dir DIR`), "
            "copy that folder here and name it instead"
        ) from None
