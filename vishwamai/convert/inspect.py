"""`vishwamai convert inspect DIR`: every tensor of a checkpoint and its place in our model; no weights are read."""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields

from vishwamai.convert.layout import Row
from vishwamai.convert.parameters import state_path
from vishwamai.convert.source import Published, Run

LEFT_OUT, LEFT_OVER, MISSING = "(left out)", "(left over)", "(missing)"


@dataclass(frozen=True)
class Place:
    """A tensor under its Hugging Face name, and the parameter that it is, or is a part of.

    layer, expert: in our parameter, whose first axes they are; empty where it has none. `file` and `parameter` are in
    brackets where there is none.
    """

    tensor: str
    shape: str
    dtype: str
    file: str
    parameter: str
    layer: str = ""
    expert: str = ""


def places(opened: Published | Run) -> list[Place]:
    """All tensors of an opened source, in the order of the name table; what the table doesn't know stands behind."""
    if isinstance(opened, Run):
        file = f"checkpoints/{opened.step}"
        held = {name: (_shape(t.shape), t.dtype.name, file) for name, t in opened.tensors.held.items()}
        return [Place(name, *held[name], *ours) for name, ours in _table(opened.rows)]
    held = {name: (_shape(t.shape), t.dtype, t.file.name) for name, t in opened.weights.held.items()}
    spell = opened.naming.spell
    known = {spell(name): ours for name, ours in _table(opened.rows)}
    found = [Place(name, *held.get(name, ("", "", MISSING)), *ours) for name, ours in known.items()]
    rest = sorted(held.keys() - known.keys())
    return found + [Place(name, *held[name], _beside(name, opened)) for name in rest]


def _table(rows: Iterable[Row]) -> Iterator[tuple[str, tuple[str, str, str]]]:
    for row in rows:
        ours = " + ".join(".".join(state_path(path)) for path in row.ours)
        for layer, expert, theirs in row.pairs():
            yield theirs, (ours, *("" if number is None else str(number) for number in (layer, expert)))


def _beside(name: str, opened: Published) -> str:
    if name in opened.repeated:
        return f"(repeats {opened.repeated[name]})"
    return LEFT_OUT if opened.family.layout.leaves_out(name) else LEFT_OVER


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def table(found: list[Place]) -> str:
    """Aligned columns under their names."""
    lines = [tuple(field.name for field in fields(Place)), *map(astuple, found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
