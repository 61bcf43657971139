"""The name table of a family: one row per parameter, read from left to right to export, right to left to import."""

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LAYER, EXPERT = "{layer}", "{expert}"


@dataclass(frozen=True)
class Transform:
    """How arrays of ours become one of theirs, and back. Both directions keep every bit.

    `to_ours` is None where several of ours are summed into one of theirs: such a row can only be exported.
    """

    to_theirs: Callable[..., np.ndarray]
    to_ours: Callable[[np.ndarray], np.ndarray] | None


SAME = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(np.transpose, np.transpose)  # our kernels are [in, out], torch's weights [out, in]


def convolution(channels: int, size: int) -> Transform:
    """A patch embedding: our [C, D], C in (channel, row, column) order, and torch's [D, channels, size, size]."""
    return Transform(
        lambda kernel: kernel.T.reshape(-1, channels, size, size),
        lambda weight: weight.reshape(len(weight), -1).T,
    )


def outer_sum(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Row vectors [G, D] and column vectors [G, D] -> one table [G * G, D]."""
    return (rows[:, None] + columns[None]).reshape(-1, rows.shape[-1])


@dataclass(frozen=True)
class Row:
    """One row of a name table.

    ours:      dotted paths of our parameters (one, unless the transform joins several); `{layer}` is the place in a
               stack, which is the parameter's first axis in memory
    theirs:    the name in a safetensors file, in the layout that Transformers writes today
    layers:    the numbers that they give to the layers of our stack; None for a parameter outside the stacks
    experts:   how many tensors of theirs, each named with `{expert}`, are one array of ours, on its first axis
    """

    ours: tuple[str, ...]
    theirs: str
    transform: Transform = SAME
    layers: range | None = None
    experts: int | None = None

    @property
    def places(self) -> Sequence[int | None]:
        """The layers of our stack."""
        return [None] if self.layers is None else range(len(self.layers))

    def names(self, layer: int | None) -> list[str]:
        """Their names of what makes one of our arrays: one, or one for each expert."""
        name = self.theirs if layer is None else self.theirs.replace(LAYER, str(self.layers[layer]))
        return [name] if self.experts is None else [name.replace(EXPERT, str(i)) for i in range(self.experts)]

    def pairs(self) -> Iterator[tuple[int | None, int | None, str]]:
        """(layer in our stack, expert in its array, their name) of every tensor that the row speaks of."""
        for layer in self.places:
            for expert, name in enumerate(self.names(layer)):
                yield layer, None if self.experts is None else expert, name


def linear(ours: str, theirs: str, bias: bool = False) -> list[Row]:
    """Rows of a linear layer."""
    rows = [Row((f"{ours}.kernel",), f"{theirs}.weight", TRANSPOSE)]
    return rows + ([Row((f"{ours}.bias",), f"{theirs}.bias")] if bias else [])


def norm(ours: str, theirs: str, bias: bool = False) -> list[Row]:
    """Rows of a normalisation."""
    rows = [Row((f"{ours}.scale",), f"{theirs}.weight")]
    return rows + ([Row((f"{ours}.bias",), f"{theirs}.bias")] if bias else [])


def inside(rows: Iterable[Row], ours: str, theirs: str, layers: range | None = None) -> list[Row]:
    """The same rows behind a prefix on either side; `layers` says that the prefixes hold a stack."""
    return [
        dataclasses.replace(
            row,
            ours=tuple(ours + name for name in row.ours),
            theirs=theirs + row.theirs,
            layers=row.layers if layers is None else layers,
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Naming:
    """A spelling under which checkpoints were published: today's prefix -> theirs, the first that fits counts."""

    name: str
    prefixes: tuple[tuple[str, str], ...] = ()

    def spell(self, name: str) -> str:
        for today, published in self.prefixes:
            if name.startswith(today):
                return published + name[len(today) :]
        return name


@dataclass(frozen=True)
class Layout:
    """How a family's checkpoints look at Hugging Face.

    architectures: what a `config.json` may call it; the first is what export writes
    rows:          model config -> name table
    read_config:   config.json -> model config; raises ConfigError for what our model can't compute
    write_config:  model config -> config.json
    namings:       spellings of the names, today's first
    left_out:      globs of their names that we don't carry, on purpose
    duplicates:    model config -> {their name: their name it repeats}; tied weights that some files hold twice
    parts:         {our prefix: family} of the parts that `init_from` can take from checkpoints of their own
    unsupported:   (model config, data config or None) -> the parts that no Transformers class computes
    companions:    (model config, tokenizer) -> {file name: content} of further JSON files that Transformers looks for
    """

    architectures: tuple[str, ...]
    rows: Callable[[Any], list[Row]]
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    namings: tuple[Naming, ...] = (Naming("today"),)
    left_out: tuple[str, ...] = ()
    duplicates: Callable[[Any], dict[str, str]] = lambda config: {}
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsupported: Callable[[Any, Any], list[str]] = lambda config, data: []
    companions: Callable[[Any, Any], dict[str, dict[str, Any]]] = lambda config, tokenizer: {}

    def names(self, config: Any) -> list[str]:
        """Every name of theirs that the model has, in today's spelling."""
        return [theirs for row in self.rows(config) for *_, theirs in row.pairs()]

    def naming_of(self, config: Any, found: Collection[str]) -> Naming:
        """The spelling that explains most of the names found in a checkpoint."""
        names, found = self.names(config), set(found)
        return max(self.namings, key=lambda naming: sum(naming.spell(name) in found for name in names))

    def naming(self, name: str) -> Naming:
        return next(naming for naming in self.namings if naming.name == name)

    def leaves_out(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.left_out)
