"""Tensors <-> parameters by a family's name table: checked names, checked shapes, one tensor at a time."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from vishwamai.checkpoint.layers import name_in_stack
from vishwamai.config import ConfigError
from vishwamai.convert.layout import LAYER, Layout, Naming, Row
from vishwamai.convert.weights import Weights

# (dotted path of a parameter, its layer in the stack or None) -> array
Fetch = Callable[[str, int | None], np.ndarray]


def abstract_parameters(build: Callable[..., nnx.Module], config: Any) -> nnx.State:
    """Shapes of all parameters of a model, nothing allocated."""
    return nnx.state(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))


def state_path(ours: str) -> tuple[str, ...]:
    """Where a row's parameter stands in an nnx.State (a stack is one array there)."""
    return tuple(part for part in ours.split(".") if part != LAYER)


def layer_name(ours: str, layer: int | None) -> str:
    """What a checkpoint of a run calls one layer's array."""
    return ours if layer is None else name_in_stack(list(state_path(ours)), layer)


class Tensors(Mapping):
    """A source of tensors under today's Hugging Face names, whatever it is kept in."""

    def __init__(self, where: str, names: Mapping[str, Callable[[], np.ndarray]]):
        self.where = where
        self._read = names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def published_tensors(weights: Weights, layout: Layout, config: Any, naming: Naming) -> Tensors:
    """A checkpoint's tensors under today's names. Raises ConfigError where they aren't those of its config."""
    check_names(weights, layout, config, naming)
    return Tensors(
        str(weights.folder),
        {name: lambda name=name: weights[naming.spell(name)] for name in layout.names(config)},
    )


def exported_tensors(where: str, rows: list[Row], fetch: Fetch) -> Tensors:
    """Our parameters as tensors under today's names, each made when it is asked for."""

    def make(row: Row, layer: int | None, expert: int | None) -> Callable[[], np.ndarray]:
        part = () if expert is None else expert
        return lambda: row.transform.to_theirs(*(fetch(ours, layer)[part] for ours in row.ours))

    found = [(row, *pair) for row in rows for pair in row.pairs()]
    # Wide types first: then every tensor of a file lies at a multiple of its own width, whatever is mixed.
    found.sort(key=lambda item: -fetch(item[0].ours[0], item[1]).itemsize)
    return Tensors(where, {theirs: make(row, layer, expert) for row, layer, expert, theirs in found})


def read_parameters(
    tensors: Tensors, rows: list[Row], abstract: nnx.State, dtype: np.dtype | None = None
) -> list[tuple[tuple, nnx.Variable]]:
    """(path, variable) of every row, from tensors under today's names; `dtype` None keeps theirs, bit for bit.

    Raises:
        ConfigError: a tensor is missing or of another shape than the config makes it, or a row can only be exported.
    """
    flat = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(abstract)}
    found = []
    for row in rows:
        path = state_path(row.ours[0])
        shape = flat[path].get_value().shape
        shape = shape if row.layers is None else shape[1:]
        arrays = [_read(tensors, row, layer, shape) for layer in row.places]
        array = arrays[0] if row.layers is None else np.stack(arrays)
        found.append((path, flat[path].replace(np.ascontiguousarray(array, dtype))))
    return found


def _read(tensors: Tensors, row: Row, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """One array of ours. Raises ConfigError where a tensor is missing or of another shape."""
    if row.experts is None:
        return _read_tensor(tensors, row.names(layer)[0], row, shape)
    return np.stack([_read_tensor(tensors, name, row, shape[1:]) for name in row.names(layer)])


def _read_tensor(tensors: Tensors, name: str, row: Row, shape: tuple[int, ...]) -> np.ndarray:
    if row.transform.to_ours is None:
        raise ConfigError(
            f"{tensors.where}: {name} is the sum of {' and '.join(row.ours)}, which can't be told apart again: "
            "set positions: table to read it"
        )
    if name not in tensors:
        near = _near(name, list(tensors))
        raise ConfigError(f"{tensors.where} has no {name}, which the config asks for{near}")
    tensor = tensors[name]
    array = row.transform.to_ours(tensor)
    if array.shape != shape:
        raise ConfigError(
            f"{tensors.where}: {name} has shape {tensor.shape}, which makes {row.ours[0]} {array.shape}; "
            f"the config makes it {shape}: weights and config are of different models"
        )
    return array


def check_names(weights: Weights, layout: Layout, config: Any, naming: Naming) -> None:
    """Raises ConfigError unless a checkpoint holds the names of the table, and else only what it leaves out."""
    expected = {naming.spell(name) for name in layout.names(config)}
    known = expected | set(repeated(weights, layout, config, naming))
    surplus = sorted(name for name in weights if name not in known and not layout.leaves_out(name))
    missing = sorted(expected - set(weights))
    lines = [*_list("missing", missing, surplus or sorted(weights))]
    lines += _list("left over", surplus, missing or sorted(expected))
    if lines:
        raise ConfigError(
            f"{weights.folder} does not hold the tensors that its config asks for:\n  " + "\n  ".join(lines)
        )


def repeated(weights: Weights, layout: Layout, config: Any, naming: Naming) -> dict[str, str]:
    """Tied weights that a checkpoint holds a second time. Raises ConfigError where the two differ."""
    found = {}
    for name, original in layout.duplicates(config).items():
        copy, first = naming.spell(name), naming.spell(original)
        if copy in weights and first in weights:
            if not np.array_equal(weights[copy], weights[first]):
                raise ConfigError(
                    f"{weights.folder}: the config ties {copy} to {first}, but the two differ: set "
                    "tie_word_embeddings to false in its config.json"
                )
            found[copy] = first
    return found


def _list(what: str, names: list[str], candidates: list[str], shown: int = 8) -> Iterator[str]:
    for name in names[:shown]:
        yield f"{name} is {what}{_near(name, candidates)}"
    if len(names) > shown:
        yield f"and {len(names) - shown} more are {what}"


def _near(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, 2, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""
