"""Tensors <-> parameters by a family's name table: checked names, checked shapes, one tensor at a time."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from vishwamai.checkpoint import Deferred
from vishwamai.checkpoint.layers import name_in_stack
from vishwamai.checkpoint.streaming import Index
from vishwamai.config import ConfigError
from vishwamai.convert.copying import copy_into, same_bits
from vishwamai.convert.layout import LAYER, Layout, Naming, Row
from vishwamai.convert.weights import Weights

# (dotted path of a parameter, its layer in the stack or None) -> array
Fetch = Callable[[str, int | None], np.ndarray | Deferred]


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

    def __init__(self, where: str, held: Mapping[str, Deferred]):
        self.where = where
        self.held = held

    def __getitem__(self, name: str) -> np.ndarray:
        return self.held[name][()]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def published_tensors(weights: Weights, layout: Layout, config: Any, naming: Naming) -> Tensors:
    """A checkpoint's tensors under today's names, as views of its files.

    Raises ConfigError where they aren't those of its config, or of a type that no parameter can be kept in.
    """
    check_names(weights, layout, config, naming)
    _check_copies(weights, repeated(weights, layout, config, naming))

    def held(own: str) -> Deferred:
        return Deferred(weights.held[own].shape, weights.dtype(own), lambda index: weights[own][index])

    return Tensors(str(weights.folder), {name: held(naming.spell(name)) for name in layout.names(config)})


def exported_tensors(where: str, rows: list[Row], fetch: Fetch) -> Tensors:
    """Our parameters as tensors under today's names, each made when it is asked for."""

    def held(row: Row, layer: int | None, expert: int | None) -> Deferred:
        arrays = [fetch(ours, layer) for ours in row.ours]
        part, shapes = ((), [a.shape for a in arrays]) if expert is None else (expert, [a.shape[1:] for a in arrays])
        to_theirs = row.transform.to_theirs
        return Deferred(
            _shape(to_theirs, shapes), arrays[0].dtype, lambda index: to_theirs(*(a[part] for a in arrays))[index]
        )

    found = [(name, held(row, layer, expert)) for row in rows for layer, expert, name in row.pairs()]
    # Wide types first: then every tensor of a file lies at a multiple of its own width, whatever is mixed.
    found.sort(key=lambda item: -item[1].dtype.itemsize)
    return Tensors(where, dict(found))


def _shape(transform: Callable[..., np.ndarray], shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what a transform makes, without the numbers."""
    return transform(*(np.broadcast_to(np.int8(0), shape) for shape in shapes)).shape


def deferred_arrays(tensors: Tensors, rows: list[Row], abstract: nnx.State) -> dict[str, Deferred]:
    """Our arrays by name, one per layer, from tensors under today's names, bit for bit; each is read when it is used.

    Raises ConfigError: a tensor is missing or of another shape than the config makes it, experts are of several types,
    or a row can only be exported.
    """
    flat = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(abstract)}
    found = {}
    for row in rows:
        shape = flat[state_path(row.ours[0])].get_value().shape
        shape = shape if row.layers is None else shape[1:]
        found |= {layer_name(row.ours[0], layer): _deferred(tensors, row, layer, shape) for layer in row.places}
    return found


def _deferred(tensors: Tensors, row: Row, layer: int | None, shape: tuple[int, ...]) -> Deferred:
    names, to_ours = row.names(layer), row.transform.to_ours
    if to_ours is None:
        raise ConfigError(
            f"{tensors.where}: {names[0]} is the sum of {' and '.join(row.ours)}, which can't be told apart again: "
            "set positions: table to read it"
        )
    for name in names:
        if name not in tensors:
            near = _near(name, list(tensors))
            raise ConfigError(f"{tensors.where} has no {name}, which the config asks for{near}")
        expected = shape if row.experts is None else shape[1:]
        if (found := _shape(to_ours, [tensors.held[name].shape])) != expected:
            raise ConfigError(
                f"{tensors.where}: {name} has shape {tensors.held[name].shape}, which makes {row.ours[0]} {found}; "
                f"the config makes it {expected}: weights and config are of different models"
            )
    dtypes = {tensors.held[name].dtype: name for name in names}
    if len(dtypes) > 1:
        found = " and ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise ConfigError(f"{tensors.where}: {found}, expected one type for all experts of a layer: save them as one")
    dtype = tensors.held[names[0]].dtype

    def read(index: Index) -> np.ndarray:
        # What is the same or transposed stays a view, so that of a part no more than that is read.
        if row.experts is None:
            return to_ours(tensors[names[0]])[index]
        parts = [to_ours(tensors[name])[index[1:]] for name in names[index[0]]]
        array = np.empty((len(parts), *parts[0].shape), dtype)
        for expert, part in zip(array, parts, strict=True):
            copy_into(expert, part)
        return array

    return Deferred(shape, dtype, read)


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
    """Tied weights that a checkpoint holds a second time: {the copy's name: the first one's}."""
    spelled = {naming.spell(copy): naming.spell(first) for copy, first in layout.duplicates(config).items()}
    return {copy: first for copy, first in spelled.items() if copy in weights and first in weights}


def _check_copies(weights: Weights, copies: Mapping[str, str]) -> None:
    for copy, first in copies.items():
        if not same_bits(weights[copy], weights[first]):
            raise ConfigError(
                f"{weights.folder}: the config ties {copy} to {first}, but the two differ: set "
                "tie_word_embeddings to false in its config.json"
            )


def _list(what: str, names: list[str], candidates: list[str], shown: int = 8) -> Iterator[str]:
    for name in names[:shown]:
        yield f"{name} is {what}{_near(name, candidates)}"
    if len(names) > shown:
        yield f"and {len(names) - shown} more are {what}"


def _near(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, 2, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""
