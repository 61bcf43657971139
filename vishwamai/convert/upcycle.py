"""`vishwamai upcycle SRC DST`: a dense checkpoint becomes a mixture of experts (Komatsuzaki et al. 2022)."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from vishwamai import families
from vishwamai.checkpoint import Deferred, save_deferred
from vishwamai.checkpoint.arrays import brief
from vishwamai.checkpoint.layers import unstack
from vishwamai.config import ConfigError
from vishwamai.convert.folder import fresh_folder
from vishwamai.convert.parameters import abstract_parameters
from vishwamai.convert.source import Published, Run, open_source
from vishwamai.families import Family
from vishwamai.models.config import MixtureConfig, TextConfig
from vishwamai.tokenizer import VishwamAITokenizer

EXPERTS, ROUTER = ".mlp.experts.", ".mlp.gate.kernel"


def upcycle(source: str | Path, destination: str | Path, num_experts: int, top_k: int, seed: int = 0) -> Family:
    """Writes a mixture whose experts are copies of the dense model's feed-forward blocks; returns its family.

    Routers start at random. As the chosen experts' weights sum to 1 and all experts are equal, the mixture computes
    what the dense model did, until training tells them apart. `destination` gets config.yaml, checkpoints/0 and the
    tokenizer; a part of one layer's array is in memory at a time.

    Raises:
        ConfigError: the source is no dense text model, no family exports such a mixture, numbers that make none,
            `destination` is not empty, or the source can't be read (see `open_source`).
    """
    opened = open_source(source)
    dense = opened.config
    if not isinstance(dense, TextConfig) or dense.mixture is not None:
        what = "is a mixture already" if isinstance(dense, TextConfig) else f"holds a {opened.family.name}"
        raise ConfigError(f"{opened.folder} {what}, expected a dense text model")
    try:
        mixture = MixtureConfig(
            num_experts=num_experts, num_experts_per_tok=top_k, moe_intermediate_size=dense.intermediate_size
        )
        config = TextConfig(**dense.model_dump() | {"mixture": mixture.model_dump()})
    except ValueError as error:
        raise ConfigError(f"no such mixture can be made of {opened.folder}: {error}") from None
    family = _family_of(config, opened)
    arrays = _arrays(opened, family, config, seed)
    with fresh_folder(destination) as folder:
        content = {"family": family.name, "model": config.model_dump(mode="json")}
        (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            VishwamAITokenizer.from_pretrained(opened.folder).save_pretrained(folder / "tokenizer")
        try:
            save_deferred(folder, arrays)
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that it is not on disk
            raise ConfigError(f"{destination} could not be written: {brief(error)}") from error
    return family


def _family_of(config: TextConfig, opened: Published | Run) -> Family:
    """The first family that computes such a mixture, in the order of their names."""
    found = {name: families.get(name) for name in families.names()}
    problems = {
        name: family.layout.unsupported(config, None)
        for name, family in found.items()
        if family.model_config is TextConfig and not _only_dense(family, config)
    }
    for name, lines in problems.items():
        if not lines:
            return found[name]
    lines = "\n  ".join(f"{name}: {lines[0]}" for name, lines in problems.items())
    raise ConfigError(f"no family computes {opened.folder} with mixtures:\n  {lines}")


def _only_dense(family: Family, config: TextConfig) -> bool:
    return any("model.mixture=" in line for line in family.layout.unsupported(config, None))


def _arrays(opened: Published | Run, family: Family, config: TextConfig, seed: int) -> dict[str, Deferred]:
    """The mixture's arrays by name, one per layer, from those of the dense model."""
    wanted = jax.eval_shape(unstack, abstract_parameters(family.build, config))
    made: dict[str, Deferred] = {}
    for number, (name, array) in enumerate(wanted.items()):
        if name.endswith(ROUTER):
            like = opened.arrays[name.replace(ROUTER, ".input_layernorm.scale")]
            made[name] = _drawn(array.shape, like.dtype, config.initializer_range, (seed, number))
        elif EXPERTS in name:
            made[name] = _repeated(opened.arrays[name.replace(EXPERTS, ".mlp.") + ".kernel"], array.shape)
        else:
            made[name] = opened.arrays[name]
    return made


def _drawn(shape: tuple[int, ...], dtype: np.dtype, deviation: float, seed: Any) -> Deferred:
    def read(index):
        return np.random.default_rng(seed).normal(0, deviation, shape).astype(dtype)[index]

    return Deferred(shape, dtype, read)


def _repeated(array: Deferred, shape: tuple[int, ...]) -> Deferred:
    def read(index):
        own, rest = index[0], tuple(index[1:])
        part = array[rest]
        return np.broadcast_to(part, (len(range(shape[0])[own]), *part.shape))

    return Deferred(shape, array.dtype, read)
