"""Layers of several kinds: which of them are scanned together, and under which names they are kept.

Layers of one kind are one stack. Where kinds alternate, what is scanned is the repeating pattern, so that windows,
rotary bases and the kind of feed-forward block stay static: Gemma 3's 26 layers (five local, one global, ...) are six
stacks of four, `layers.0::6` (layers 0, 6, 12, 18) to `layers.5::6`, and behind them `layers.24` and `layers.25`.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from flax import nnx

from vishwamai.models.layers import scan, stack, unstack

Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True)
class Stack:
    """Layers that are kept together: their numbers, and whether each parameter has a first axis for them.

    name: what they are called in `layers`; "" where they are all there is.
    """

    name: str
    numbers: range
    stacked: bool


@dataclass(frozen=True)
class Pattern:
    """`before` layers one by one, then a pattern of `period` layers `repeats` times, then the rest one by one."""

    before: int
    period: int
    repeats: int
    total: int

    @property
    def scanned(self) -> list[Stack]:
        """The stacks, in the order of the pattern."""
        if self.repeats == self.total:
            return [Stack("", range(self.total), True)]
        end = self.before + self.period * self.repeats
        starts = range(self.before, self.before + self.period) if self.repeats else ()
        return [Stack(f"{first}::{self.period}", range(first, end, self.period), True) for first in starts]

    @property
    def first(self) -> list[Stack]:
        """Layers before the pattern."""
        return [Stack(str(i), range(i, i + 1), False) for i in range(self.before)]

    @property
    def last(self) -> list[Stack]:
        """Layers behind the pattern."""
        return [
            Stack(str(i), range(i, i + 1), False) for i in range(self.before + self.period * self.repeats, self.total)
        ]

    @property
    def stacks(self) -> list[Stack]:
        return [*self.first, *self.scanned, *self.last]


def find_pattern(kinds: Sequence[Kind]) -> Pattern:
    """The pattern with the fewest layers to compile; of equal ones that which begins first, then the shortest."""
    total = len(kinds)
    best = Pattern(total, 0, 0, total) if total > 1 else Pattern(0, 1, total, total)
    for before in range(total):
        for period in range(1, (total - before) // 2 + 1):
            repeats = 1
            while kinds[before : before + period] == kinds[before + repeats * period :][:period]:
                repeats += 1
            found = Pattern(before, period, repeats, total)
            if repeats > 1 and _compiled(found) < _compiled(best):
                best = found
    return best


def _compiled(pattern: Pattern) -> int:
    return pattern.total - pattern.period * (pattern.repeats - 1) if pattern.repeats else pattern.total


class Layers(nnx.Module):
    """Stacks by name, where there are several."""


def make_layers(make: Callable[[Kind, nnx.Rngs], nnx.Module], kinds: Sequence[Kind], rngs: nnx.Rngs) -> nnx.Module:
    """Layers of these kinds: one stack, or `Layers`."""

    def of(part: Stack) -> nnx.Module:
        one = lambda rngs: make(kinds[part.numbers[0]], rngs)  # noqa: E731
        return stack(one, len(part.numbers), rngs) if part.stacked else one(rngs)

    parts = find_pattern(kinds).stacks
    if not parts[0].name:
        return of(parts[0])
    layers = Layers()
    for part in parts:
        setattr(layers, part.name, of(part))
    return layers


def _part(layers: nnx.Module, part: Stack) -> nnx.Module:
    return getattr(layers, part.name) if part.name else layers


def run(
    layers: nnx.Module, pattern: Pattern, body: Callable, x: Any, checkpoint: Callable | None = None
) -> tuple[Any, dict[str, Any]]:
    """`body(layer, x) -> (x, output)` over all layers in order: (x, the outputs of each stack by its name).

    `checkpoint` wraps the body of each layer (jax.checkpoint with a policy).
    """

    def one(layer: nnx.Module, x):
        graph, state = nnx.split(layer)
        apply = lambda state, x: body(nnx.merge(graph, state), x)  # noqa: E731
        return (checkpoint(apply) if checkpoint else apply)(state, x)

    def turn(layers: list[nnx.Module], x, _):
        found = []
        for layer in layers:
            x, output = one(layer, x)
            found.append(output)
        return x, found

    outputs = {}
    for part in pattern.first:
        x, outputs[part.name] = one(_part(layers, part), x)
    if scanned := pattern.scanned:
        x, found = scan([_part(layers, part) for part in scanned], turn, x, layers_a_turn=len(scanned))
        outputs |= {part.name: output for part, output in zip(scanned, found, strict=True)}
    for part in pattern.last:
        x, outputs[part.name] = one(_part(layers, part), x)
    return x, outputs


def by_number(pattern: Pattern, outputs: Mapping[str, Any]) -> list[Any]:
    """What `run` gathered, one entry for each layer, in their order."""
    found = {}
    for part in pattern.stacks:
        for i, number in enumerate(part.numbers):
            found[number] = (
                jax.tree.map(lambda x, i=i: x[i], outputs[part.name]) if part.stacked else outputs[part.name]
            )
    return [found[number] for number in range(pattern.total)]


def one_by_one(layers: nnx.Module, pattern: Pattern) -> list[nnx.Module]:
    """All layers in order, as `layers.unstack` gives them."""
    found = {}
    for part in pattern.stacks:
        own = unstack(_part(layers, part), part.stacked)
        found |= dict(zip(part.numbers, own, strict=True))
    return [found[number] for number in range(pattern.total)]


def parts_of(pattern: Pattern) -> Iterator[tuple[str, Stack]]:
    """(prefix of our parameters' paths, stack) of every stack, as name tables write them."""
    for part in pattern.stacks:
        yield ".".join(["layers", *([part.name] if part.name else []), *(["{layer}"] if part.stacked else [])]), part
