"""Small tables of numbers: named rows, two or three columns; three layout families and one held out."""

from parsit_jax.documents.generator import values
from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Question, Split
from parsit_jax.documents.generator.page import Cell, Row, arrange, centre, row
from parsit_jax.documents.generator.values import Source
from parsit_jax.documents.generator.words import MONTHS

LAYOUTS = {
    "plain": (Split.TRAIN,),
    "ruled": (Split.TRAIN,),
    "grid": (Split.TRAIN,),
    "names_right": (Split.HELD_OUT,),
}

TITLES = ("Sales", "Orders", "STOCK", "Visitors", "Output", "Budget", "Costs", "EXPORTS")
CORNERS = ("", "Item", "Name", "Goods")

_COLUMN_NAMES = (
    ("Q1", "Q2", "Q3", "Q4"),
    MONTHS,
    tuple(str(year) for year in range(1990, 2031)),
    ("Min", "Max", "Mean"),
    ("In", "Out", "Left"),
    ("A", "B", "C", "D"),
)


def _columns(source: Source, count: int) -> list[str]:
    """Names of neighbouring columns."""
    names = source.pick(_COLUMN_NAMES)
    first = source.integer(0, len(names) - count)
    return list(names[first : first + count])


def compose_table(source: Source, layout: str, font: str, height: int, width: int) -> Composition | None:
    """Draws a table; None where it does not fit the page."""
    columns = _columns(source, source.pick((2, 2, 3)))
    wide = len(columns) == 3
    names = values.items(source, source.integer(3, 6), longest=6 if wide else 10)
    print_number = str if wide else values.quantity_style(source)
    numbers: set[int] = set()
    while len(numbers) < len(columns) * len(names):
        numbers.add(values.cents(source, 100, 9_999 if wide else 99_999))
    printed = iter([print_number(number) for number in source.rng.permutation(sorted(numbers)).tolist()])
    body = {name: [next(printed) for _ in columns] for name in names}

    # Numbers end at these fractions of the width; the names take what is left.
    name_cell = 1.0 if layout == "names_right" else 0.0
    step = 0.24 if wide else 0.3
    ends = [step * (index + 1) + (1 - name_cell) * (1 - step * len(columns)) for index in range(len(columns))]

    def line(name: str, cells: list[str], *, rule: bool) -> Row:
        placed = [Cell(text, end, 1.0) for text, end in zip(cells, ends, strict=True)]
        if name:
            placed.insert(len(placed) if name_cell else 0, Cell(name, name_cell, name_cell))
        return row(*placed, rule=rule)

    grid = layout == "grid"
    title = [row(centre(source.pick(TITLES)))] if source.chance(0.6) else []
    corner = source.pick(CORNERS)
    rows = [line(corner, columns, rule=grid and bool(title))]
    rows += [
        line(name, cells, rule=grid or (index == 0 and layout != "plain"))
        for index, (name, cells) in enumerate(body.items())
    ]
    page = arrange(source, [*title, *rows], font, height, width, border=grid)
    if page is None:
        return None
    cells = [(name, column, text) for name in names for column, text in zip(columns, body[name], strict=True)]
    questions = tuple(Question(f"What is the {column} value of {name}?", text, "value") for name, column, text in cells)
    return Composition(page, questions, {f"{column} of {name}": text for name, column, text in cells})
