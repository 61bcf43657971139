"""Labelled values in layout families: what receipts, invoices and forms share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Question, Split
from parsit_jax.documents.generator.page import Cell, Page, Row, arrange, left, right, row
from parsit_jax.documents.generator.values import Source


@dataclass(frozen=True)
class Entry:
    """A labelled value. Without a label it stands alone, like a title; without a field nobody asks for it."""

    label: str
    value: str
    field: str = ""


Line = Entry | Row | str


# ------------------------------------------------------------------------------------------- rows of an entry


def ledger_row(entry: Entry) -> Row:
    """Label at the left edge, value at the right one."""
    return row(left(entry.label), right(entry.value))


def colon_row(entry: Entry) -> Row:
    """Both at the left edge, a colon between."""
    return row(left(f"{entry.label.rstrip('.')}: {entry.value}"))


def centred_row(entry: Entry) -> Row:
    """Both in the middle."""
    return row(Cell(f"{entry.label} {entry.value}", 0.5, 0.5))


def tabbed_row(axis: float) -> Callable[[Entry], Row]:
    """Label ends and value begins at `axis`, a fraction of the width."""
    gap = 0.03
    return lambda entry: row(Cell(entry.label, axis - gap, 1.0), Cell(entry.value, axis + gap, 0.0))


ROW_STYLES: dict[str, Callable[[Source], Callable[[Entry], Row]]] = {
    "ledger": lambda source: ledger_row,
    "colon": lambda source: colon_row,
    "centred": lambda source: centred_row,
    "tabbed": lambda source: tabbed_row(source.uniform(0.46, 0.56)),
}


def stacked_rows(entries: list[Entry], *, value_first: bool) -> list[Row]:
    """Labels above their values, two entries side by side; an odd last one as in a ledger.

    With `value_first`, labels stand below their values, under a line, as on forms filled in by hand.
    """
    rows = []
    for start in range(0, len(entries) - 1, 2):
        first, second = entries[start : start + 2]
        labels = row(left(first.label), right(second.label), rule=value_first)
        answers = row(left(first.value), right(second.value), space=0.4 * value_first)
        rows.extend((answers, labels) if value_first else (labels, answers))
    if len(entries) % 2:
        rows.append(replace(ledger_row(entries[-1]), space=0.4 * value_first))
    return rows


# ------------------------------------------------------------------------------------------- layout families


@dataclass(frozen=True)
class Family:
    """A layout family.

    Attributes:
        orders: orders of the sections down the page, one picked at random.
        style: how an entry is printed, a key of ROW_STYLES.
        alignments: where lines of plain text may stand (0 left, 0.5 middle, 1 right).
        rules: how often lines separate the sections.
        ruled: a line above every entry.
        border: a frame around all.
        stacked: sections whose labels stand above their values, two by two.
        value_first: in these, the value stands above its label.
        split: where the family is used.
    """

    orders: tuple[tuple[str, ...], ...]
    style: str = "ledger"
    alignments: tuple[float, ...] = (0.0, 0.5)
    rules: float = 0.3
    ruled: bool = False
    border: bool = False
    stacked: tuple[str, ...] = ()
    value_first: bool = False
    split: Split = Split.TRAIN


def lay_out(
    source: Source,
    family: Family,
    sections: Mapping[str, list[Line]],
    font: str,
    height: int,
    width: int,
) -> Page | None:
    """Places the sections, whose lines are entries, plain text or rows; None where they do not fit."""
    style = ROW_STYLES[family.style](source)
    align, scale = source.pick(family.alignments), source.pick((1.0, 1.0, 1.15))
    rules = source.chance(family.rules)

    def title(text: str) -> Row:
        return row(Cell(text, align, align), scale=scale)

    rows: list[Row] = []
    for name in source.pick(family.orders):
        lines = sections[name]
        if name in family.stacked:
            section = stacked_rows(lines, value_first=family.value_first)
        else:
            section = [_as_row(line, style, title, ruled=family.ruled) for line in lines]
        if rules and rows and section:
            section[0] = replace(section[0], rule=True)
        rows.extend(section)
    return arrange(source, rows, font, height, width, border=family.border)


def _as_row(line: Line, style: Callable[[Entry], Row], title: Callable[[str], Row], *, ruled: bool) -> Row:
    if isinstance(line, Row):
        return line
    if isinstance(line, Entry):
        return replace(style(line), rule=ruled) if line.label else title(line.value)
    return replace(title(line), scale=1.0)


def compose(
    source: Source,
    family: Family,
    sections: Mapping[str, list[Line]],
    questions: Mapping[str, str],
    font: str,
    height: int,
    width: int,
) -> Composition | None:
    """Lays the sections out and asks about each entry that has a field; None where they do not fit.

    A question with {label} in it may be asked about several entries.
    """
    page = lay_out(source, family, sections, font, height, width)
    if page is None:
        return None
    asked, fields = [], {}
    for line in chain.from_iterable(sections.values()):
        if isinstance(line, Entry) and line.field:
            question = questions[line.field]
            asked.append(Question(question.format(label=line.label), line.value, line.field))
            name = f"{line.field} {line.label}" if "{label}" in question else line.field
            fields[name] = line.value
    return Composition(page, tuple(asked), fields)
