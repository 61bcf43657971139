"""`init_from`: weights that a training run starts from, of the whole model or of its parts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from vishwamai import families
from vishwamai.checkpoint import Deferred
from vishwamai.checkpoint.layers import unstack
from vishwamai.config import Config, ConfigError, differences
from vishwamai.convert.layout import Row
from vishwamai.convert.mixture_keys import TRAINING
from vishwamai.convert.parameters import abstract_parameters, deferred_arrays, layer_name, state_path
from vishwamai.convert.placing import place
from vishwamai.convert.source import Published, Run, open_source
from vishwamai.families import Family

Source = Published | Run
# Changing these keeps every weight's shape and meaning: a run may well do so.
_FREE = {
    "max_position_embeddings",
    "initializer_range",
    "image_token_id",
    "image_mask",
    "vision_feature_layer",
    "pooling",
    "vision_use_head",
    "router_aux_loss_coef",
    *TRAINING,
}


def load_parameters(
    source: str | Path | Mapping[str, str], family: Family, config: Config, shardings: nnx.State | None = None
) -> nnx.State:
    """Float32 parameters for a model of `family` with `config`, laid out by `shardings` (default: on the first device).

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
        _same_architecture(opened, opened.config, config, "init_from")
        return place(_read(opened, rows, abstract), abstract, "float32", shardings)
    found, wanted = {}, set()
    for part, folder in source.items():
        inside = [row for row in rows if row.ours[0].startswith(f"{part}.")]
        if not inside:
            parts = sorted({row.ours[0].split(".")[0] for row in rows})
            raise ConfigError(f"init_from.{part}: a {family.name} has no such part; its parts: {', '.join(parts)}")
        found |= _read_part(part, open_source(folder), inside, family, config, abstract)
        wanted |= {state_path(ours) for row in inside for ours in row.ours}

    def only(state: nnx.State) -> nnx.State:
        return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(state) if path in wanted])

    return place(found, only(abstract), "float32", None if shardings is None else only(shardings))


def _read_part(
    part: str, opened: Source, rows: list[Row], family: Family, config: Config, abstract: nnx.State
) -> dict[str, Deferred]:
    where = f"init_from.{part}"
    alone = family.layout.parts.get(part)  # the family of the part where it is a model of its own
    if opened.family.name == family.name:
        if alone:
            kind = families.get(alone).model_config
            _same_architecture(opened, _section(opened.config, kind), _section(config, kind), where)
        else:
            _same_parameters(opened, part, rows, where)
        return _read(opened, rows, abstract)
    if not alone:
        raise ConfigError(f"{where}: {opened.folder} holds a {opened.family.name}, expected a {family.name}")
    _same_family(opened, alone, where)
    _same_architecture(opened, opened.config, _section(config, opened.family.model_config), where)
    rows = [dataclasses.replace(row, theirs=row.theirs.removeprefix(f"{part}.")) for row in rows]
    return _read(opened, rows, abstract)


def _section(config: Config, kind: type[Config]) -> Config:
    """The section of a config that describes a part."""
    return next(value for value in vars(config).values() if isinstance(value, kind))


def _read(opened: Source, rows: list[Row], abstract: nnx.State) -> dict[str, Deferred]:
    """The arrays of `rows`; of a run whose own table has the same ones, as they lie there."""
    own = {ours: row.layers for row in opened.rows for ours in row.ours}
    wanted = {ours: row.layers for row in rows for ours in row.ours}
    if not (isinstance(opened, Run) and wanted.items() <= own.items()):
        return deferred_arrays(opened.tensors, rows, abstract)
    shapes = {name: array.shape for name, array in jax.eval_shape(unstack, abstract).items()}
    names = [layer_name(ours, layer) for row in rows for ours in row.ours for layer in row.places]
    for name in names:
        if opened.arrays[name].shape != shapes[name]:
            raise ConfigError(
                f"{opened.folder}: {name} has shape {opened.arrays[name].shape}, the config makes it {shapes[name]}"
            )
    return {name: opened.arrays[name] for name in names}


def _same_family(opened: Source, name: str, where: str) -> None:
    if opened.family.name != name:
        raise ConfigError(f"{where}: {opened.folder} holds a {opened.family.name}, expected a {name}")


def _same_parameters(opened: Source, part: str, rows: list[Row], where: str) -> None:
    """Raises ConfigError where a part has parameters or layers that the config's doesn't have, or the other way."""
    own = [row for row in opened.family.layout.rows(opened.config) if row.ours[0].startswith(f"{part}.")]
    theirs, ours = ({name: len(row.layers or [0]) for row in table for name in row.ours} for table in (own, rows))
    lines = [
        f"  {name}: the weights have {theirs.get(name, 0)}, the config makes it {ours.get(name, 0)}"
        for name in theirs | ours
        if theirs.get(name) != ours.get(name)
    ]
    if lines:
        raise ConfigError(f"{where}: {opened.folder} has not as many of each parameter:\n" + "\n".join(lines))


def _same_architecture(opened: Source, theirs: Config, ours: Config, where: str) -> None:
    """Raises ConfigError where the weights were made for another config; sizes and constants alike."""
    theirs, ours = theirs.model_dump(mode="json"), ours.model_dump(mode="json")
    keys = [key for key in differences(theirs, ours) if key.split(".")[-1] not in _FREE]
    if keys:
        lines = [f"  {key}: the weights have {_at(theirs, key)}, the config says {_at(ours, key)}" for key in keys]
        raise ConfigError(f"{where}: {opened.folder} is of another architecture than the config:\n" + "\n".join(lines))


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree
