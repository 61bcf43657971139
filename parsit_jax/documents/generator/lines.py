"""Mixed text without a form: a clean line (`plain_lines`), up to three (`lines`), or a page full (`notes`).

For learning to read before learning to answer, so there are no questions.
"""

from dataclasses import replace
from functools import partial

from parsit_jax.documents.generator import values
from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Split
from parsit_jax.documents.generator.page import Cell, Row, arrange, left, right, row
from parsit_jax.documents.generator.values import Source

LAYOUTS = {"scattered": tuple(Split)}


def token(source: Source) -> str:
    """A word, amount, date, number or random string of the source's split."""
    kind = source.integer(0, 9)
    if kind <= 1:
        return values.money_style(source)(values.cents(source))
    if kind == 2:
        return values.date_style(source)(values.day(source))
    if kind == 3:
        return values.number(source)
    if kind <= 5:
        return values.random_string(source)
    word = values.company(source) if kind == 6 else values.item(source) if kind == 7 else values.invented(source, 2)
    return source.pick((str, str, str.upper))(word)


def text_line(source: Source, longest: int) -> str:
    """Tokens joined by a space, at most `longest` characters (at least one token)."""
    line, wanted = token(source), source.integer(1, longest)
    while len(line) < wanted:
        more = f"{line} {token(source)}"
        if len(more) > longest:
            break
        line = more
    return line


def _row(source: Source, at: float | None) -> Row:
    """A line of text at the fraction `at` of the width, or two tokens at the two edges."""
    if source.chance(0.25):
        return row(left(token(source)), right(token(source)))
    place = source.rng.random() if at is None else at
    return row(Cell(text_line(source, 20), place, place))


def compose(
    source: Source, layout: str, font: str, height: int, width: int, *, fewest: int, most: int, plain: bool = False
) -> Composition | None:
    """Draws `fewest` to `most` lines, `plain` ones black on white; None where they do not fit the page."""
    at = source.pick((None, 0.0, 0.0, 0.5))
    rows = [_row(source, at) for _ in range(source.integer(fewest, most))]
    page = arrange(source, rows, font, height, width, border=source.chance(0.05))
    return Composition(replace(page, plain=plain)) if page else None


compose_plain_line = partial(compose, fewest=1, most=1, plain=True)
compose_lines = partial(compose, fewest=1, most=3)
compose_notes = partial(compose, fewest=5, most=9)
