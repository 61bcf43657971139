"""Bar charts whose bars carry their values; two layout families and one held out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from parsit_jax.documents.generator import values
from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Question, Split
from parsit_jax.documents.generator.page import SIZES, Page, Run, Stroke, Type, page_scale
from parsit_jax.documents.generator.tables import TITLES
from parsit_jax.documents.generator.values import Source


@dataclass(frozen=True)
class _Bar:
    """A labelled bar; `share` is its length as a part of the longest one's."""

    label: str
    value: str
    share: float


@dataclass(frozen=True)
class _Area:
    """Where a chart may draw: left, top, right, bottom."""

    x0: int
    y0: int
    x1: int
    y1: int


Drawn = tuple[list[Run], list[Stroke]]


def _draw_bars(bars: list[_Bar], setting: Type, area: _Area, shade: float) -> Drawn | None:
    """Bars that lie: the label left of each, the value behind its end."""
    gap = round(0.5 * setting.size)
    pitch = (area.y1 - area.y0) / len(bars)
    start = area.x0 + max(setting.width(bar.label) for bar in bars) + gap
    longest = area.x1 - max(setting.width(bar.value) for bar in bars) - gap - start
    texts = "".join(bar.label + bar.value for bar in bars)
    if pitch < setting.rise(texts) + setting.fall(texts) + 2 or longest < 2 * setting.size:
        return None
    runs, strokes = [], [Stroke((start - 1, area.y0, start - 1, area.y1 - 1))]
    for index, bar in enumerate(bars):
        middle = area.y0 + round((index + 0.5) * pitch)
        baseline = middle + round(0.35 * setting.size)
        end = start + max(1, round(bar.share * longest))
        half = round(0.3 * setting.size)
        strokes.append(Stroke((start, middle - half, end, middle + half), shade))
        runs.append(Run(bar.label, area.x0, baseline, setting))
        runs.append(Run(bar.value, end + gap, baseline, setting))
    return runs, strokes


def _draw_upright(bars: list[_Bar], setting: Type, area: _Area, shade: float, *, stems: bool) -> Drawn | None:
    """Bars, or stems with a square head, that stand on their labels; the value above each."""
    pitch = (area.x1 - area.x0) / len(bars)
    widest = max(max(setting.width(bar.label), setting.width(bar.value)) for bar in bars)
    labels, numbers = "".join(bar.label for bar in bars), "".join(bar.value for bar in bars)
    label_baseline = area.y1 - setting.fall(labels)
    floor = label_baseline - setting.rise(labels) - 2
    above = 2 + setting.fall(numbers)
    tallest = floor - area.y0 - above - setting.rise(numbers)
    if widest > pitch - 0.5 * setting.size or tallest < 2 * setting.size:
        return None
    runs, strokes = [], [Stroke((area.x0, floor, area.x1 - 1, floor))]
    for index, bar in enumerate(bars):
        middle = area.x0 + round((index + 0.5) * pitch)
        top = floor - max(4, round(bar.share * tallest))
        half = round(0.22 * pitch)
        if stems:
            head = max(1, round(0.2 * setting.size))
            strokes.append(Stroke((middle, top, middle, floor)))
            strokes.append(Stroke((middle - head, top, middle + head, top + 2 * head)))
        else:
            strokes.append(Stroke((middle - half, top, middle + half, floor), shade))
        runs.append(Run(bar.label, middle - setting.width(bar.label) // 2, label_baseline, setting))
        runs.append(Run(bar.value, middle - setting.width(bar.value) // 2, top - above, setting))
    return runs, strokes


_DRAW: dict[str, Callable[[list[_Bar], Type, _Area, float], Drawn | None]] = {
    "bars": _draw_bars,
    "columns": partial(_draw_upright, stems=False),
    "lollipops": partial(_draw_upright, stems=True),
}

LAYOUTS = {"bars": (Split.TRAIN,), "columns": (Split.TRAIN,), "lollipops": (Split.HELD_OUT,)}


def _draw_data(source: Source, count: int, longest: int) -> list[_Bar]:
    """Bars with values of one order of magnitude, all different; labels of at most `longest` characters."""
    largest = values.cents(source, 1_000, 99_999)
    numbers = [largest]
    while len(numbers) < count:
        number = source.keep(lambda: source.integer(largest // 10, largest), str)
        if number not in numbers:
            numbers.append(number)
    print_number = values.quantity_style(source)
    order = source.rng.permutation(count).tolist()
    names = values.items(source, count, longest)
    return [_Bar(name, print_number(numbers[at]), numbers[at] / largest) for name, at in zip(names, order, strict=True)]


def compose_chart(source: Source, layout: str, font: str, height: int, width: int) -> Composition | None:
    """Draws a chart; None where it does not fit the page."""
    # Upright bars stand side by side: the more, the shorter their labels.
    count, longest = source.pick(((3, 10), (4, 10), (5, 10)) if layout == "bars" else ((2, 10), (3, 6), (4, 5)))
    bars = _draw_data(source, count, longest)
    scale = page_scale(height, width)
    x0, x1, y0, y1 = (round(source.uniform(2, 6) * scale) for _ in range(4))
    title = source.pick(TITLES)
    shade = source.uniform(0.3, 0.9)
    wanted = source.pick(SIZES)
    for size in (size for size in reversed(SIZES) if size <= wanted):
        setting = Type(font, size * scale)
        title_baseline = y0 + setting.rise(title)
        top = title_baseline + setting.fall(title) + round(0.4 * setting.size)
        drawn = _DRAW[layout](bars, setting, _Area(x0, top, width - x1, height - y1), shade)
        if drawn is not None:
            break
    else:
        return None
    runs, strokes = drawn
    title_x = x0 + round(source.rng.random() * (width - x0 - x1 - setting.width(title)))
    runs.append(Run(title, title_x, title_baseline, setting))
    questions = tuple(Question(f"What is the value of {bar.label}?", bar.value, "value") for bar in bars)
    page = Page(height, width, tuple(runs), tuple(strokes))
    return Composition(page, questions, {bar.label: bar.value for bar in bars})
