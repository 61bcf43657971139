"""`init_from`: weights that a training run starts from, of the whole model or of its parts."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from vishwamai.config import Config, ConfigError, differences
from vishwamai.convert.layout import Row
from vishwamai.convert.parameters import abstract_parameters, read_parameters
from vishwamai.convert.source import Published, Run, open_source
from vishwamai.families import Family

log = logging.getLogger(__name__)

Source = Published | Run
# Changing these keeps every weight's shape and meaning: a run may well do so.
_FREE = {
    "max_position_embeddings",
    "initializer_range",
    "image_token_id",
    "image_mask",
    "vision_feature_layer",
    "pooling",
}


def load_parameters(source: str | Path | Mapping[str, str], family: Family, config: Config) -> nnx.State:
    """Float32 parameters for a model of `family` with `config`.

    `source` is a run, one of its checkpoints, a Hugging Face folder or id; or {part: such a place}, where a part is a
    prefix of parameter paths that the family names (`language_model`, `vision_tower`) or any first part of a path
    when the place holds a model of the same family. With parts, the state holds those parts only.

    Raises:
        ConfigError: a part that the model doesn't have, weights of another model, or of one with another config.
    """
    abstract = abstract_parameters(family.build, config)
    rows = family.layout.rows(config)
    if not isinstance(source, Mapping):
        opened = open_source(source)
        _same_family(opened, family.name, "init_from")
        _same_architecture(opened, config, "init_from")
        return nnx.from_flat_state(_read(opened, rows, abstract))
    found = []
    for part, place in source.items():
        inside = [row for row in rows if row.ours[0].startswith(f"{part}.")]
        if not inside:
            parts = sorted({row.ours[0].split(".")[0] for row in rows})
            raise ConfigError(f"init_from.{part}: a {family.name} has no such part; its parts: {', '.join(parts)}")
        found += _read_part(part, open_source(place), inside, family, config, abstract)
    return nnx.from_flat_state(found)


def _read_part(
    part: str, opened: Source, rows: list[Row], family: Family, config: Config, abstract: nnx.State
) -> list[Parameter]:
    where = f"init_from.{part}"
    if opened.family.name == family.name:
        _same_architecture(opened, config, where, part)
        return _read(opened, rows, abstract)
    if part not in family.layout.parts:
        raise ConfigError(f"{where}: {opened.folder} holds a {opened.family.name}, expected a {family.name}")
    _same_family(opened, family.layout.parts[part], where)
    _same_architecture(opened, _part_config(config, opened), where)
    alone = [dataclasses.replace(row, theirs=row.theirs.removeprefix(f"{part}.")) for row in rows]
    return _read(opened, alone, abstract)


def _read(opened: Source, rows: list[Row], abstract: nnx.State) -> list[Parameter]:
    """The parameters of `rows`; of a run whose own table has these rows, as they lie there."""
    wanted = {ours for row in rows for ours in row.ours}
    own = {ours: row for row in opened.family.layout.rows(opened.config) for ours in row.ours}
    if isinstance(opened, Run) and all(ours in own and own[ours].layers == row.layers for row in rows for ours in row.ours):
        paths = {state_path(ours) for ours in wanted}
        return [(path, value) for path, value in nnx.to_flat_state(opened.parameters("float32")) if path in paths]
    return read_parameters(opened.tensors, rows, abstract, np.dtype(np.float32))


def _part_config(config: Config, opened: Source) -> Any:
    """The section of a config that describes the part."""
    kind = opened.family.model_config
    return next(value for value in vars(config).values() if isinstance(value, kind))


def _same_family(opened: Source, name: str, where: str) -> None:
    if opened.family.name != name:
        raise ConfigError(f"{where}: {opened.folder} holds a {opened.family.name}, expected a {name}")


def _same_architecture(opened: Source, config: Config, where: str) -> None:
    """Raises ConfigError where the weights were made for another config; sizes and constants alike."""
    theirs, ours = opened.config.model_dump(mode="json"), config.model_dump(mode="json")
    keys = [key for key in differences(theirs, ours) if key.split(".")[-1] not in _FREE]
    if keys:
        lines = [f"  {key}: the weights have {_at(theirs, key)}, the config says {_at(ours, key)}" for key in keys]
        raise ConfigError(f"{where}: {opened.folder} is of another architecture than the config:\n" + "\n".join(lines))


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree
