"""Pages as rows of text cells: choosing a font size at which everything fits, placing, and drawing.

Nothing is ever clipped or overlaps: a page that does not fit at the smallest legible size is refused (None),
and the caller draws other content.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from parsit_jax.documents.generator.fonts import glyph
from parsit_jax.documents.generator.values import Source

SIZES = (9.0, 9.5, 10.0, 10.5, 11.0, 11.5, 12.0)
"""Font sizes in pixels on a page of 128 x 128; larger pages scale them. Below 9, characters merge."""


def page_scale(height: int, width: int) -> float:
    """By how much everything is larger than on a page of 128 x 128: the shorter side decides, at least 1."""
    return max(1.0, min(height, width) / 128)


@dataclass(frozen=True)
class Cell:
    """Text in a row: its point `anchor` (0 its left end, 1 its right end) lies at `at` of the row's width."""

    text: str
    at: float = 0.0
    anchor: float = 0.0


def left(text: str) -> Cell:
    return Cell(text, 0.0, 0.0)


def centre(text: str) -> Cell:
    return Cell(text, 0.5, 0.5)


def right(text: str) -> Cell:
    return Cell(text, 1.0, 1.0)


@dataclass(frozen=True)
class Row:
    """Cells on one baseline.

    `scale` enlarges their font, `rule` draws a line above, `space` em of white set them off from above.
    """

    cells: tuple[Cell, ...]
    scale: float = 1.0
    rule: bool = False
    space: float = 0.0


def row(*cells: Cell, scale: float = 1.0, rule: bool = False, space: float = 0.0) -> Row:
    return Row(cells, scale, rule, space)


@dataclass(frozen=True)
class Type:
    """What text is set in: font, size in pixels, and pixels added between letters."""

    font: str
    size: float
    spacing: int = 0

    def width(self, text: str) -> int:
        """Pixels that the text takes."""
        return sum(glyph(self.font, self.size, each).advance + self.spacing for each in text) - self.spacing

    def rise(self, text: str) -> int:
        """Pixels of ink above the baseline."""
        return max(-glyph(self.font, self.size, each).top for each in text)

    def fall(self, text: str) -> int:
        """Pixels of ink below the baseline."""
        glyphs = (glyph(self.font, self.size, each) for each in text)
        return max(each.top + each.ink.shape[0] for each in glyphs)


@dataclass(frozen=True)
class Run:
    """Text placed on the page: where it starts, its baseline, what it is set in."""

    text: str
    x: int
    baseline: int
    type: Type

    def ink(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """The ink of each character with its left and top edge."""
        x = self.x
        for character in self.text:
            each = glyph(self.type.font, self.type.size, character)
            if each.ink.size:
                yield x + each.left, self.baseline + each.top, each.ink
            x += each.advance + self.type.spacing

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The smallest box (x0, y0, x1, y1; right and bottom excluded) around the ink."""
        edges = [(x, y, x + ink.shape[1], y + ink.shape[0]) for x, y, ink in self.ink()]
        x0, y0, x1, y1 = zip(*edges, strict=True)
        return min(x0), min(y0), max(x1), max(y1)


@dataclass(frozen=True)
class Stroke:
    """A filled rectangle (x0, y0, x1, y1), ends included; `shade` 0 is paper, 1 is ink."""

    box: tuple[int, int, int, int]
    shade: float = 1.0


@dataclass(frozen=True)
class Page:
    """Everything placed, ready to draw."""

    height: int
    width: int
    runs: tuple[Run, ...]
    strokes: tuple[Stroke, ...] = ()
    plain: bool = False  # black on white, without shading and noise

    @property
    def transcription(self) -> str:
        """Lines from top to bottom, runs of a line (baselines within half a letter) joined by a space."""
        lines: list[list[Run]] = []
        for run in sorted(self.runs, key=lambda run: run.baseline):
            if lines and run.baseline - lines[-1][0].baseline < run.type.size / 2:
                lines[-1].append(run)
            else:
                lines.append([run])
        ordered = (sorted(line, key=lambda run: run.x) for line in lines)
        return "\n".join(" ".join(run.text for run in line) for line in ordered)


def frame(x0: int, y0: int, x1: int, y1: int, shade: float = 1.0) -> tuple[Stroke, ...]:
    """The four sides of a rectangle."""
    sides = ((x0, y0, x1, y0), (x0, y1, x1, y1), (x0, y0, x0, y1), (x1, y0, x1, y1))
    return tuple(Stroke(side, shade) for side in sides)


def _spread(cells: tuple[Cell, ...], setting: Type, width: int) -> list[int] | None:
    """The cells' starts within a row of `width`; None where they leave the row or come too close."""
    starts, end = [], -1000
    for cell in cells:
        wide = setting.width(cell.text)
        start = round(cell.at * width - cell.anchor * wide)
        if start < max(0, end + 0.55 * setting.size) or start + wide > width:
            return None
        starts.append(start)
        end = start + wide
    return starts


def _baselines(rows: list[Row], types: list[Type]) -> tuple[list[int], int]:
    """The rows' baselines when set as tightly as ink that touches no ink allows, and the lower end of all."""
    baselines, fall = [], 0
    for each, setting in zip(rows, types, strict=True):
        text = "".join(cell.text for cell in each.cells)
        if baselines:
            room = fall + setting.rise(text) + 1
            pitch = max(room, 1.13 * setting.size) + each.space * setting.size
            if each.rule:
                pitch = max(pitch + 0.3 * setting.size, room + 3)
            baselines.append(baselines[-1] + math.ceil(pitch))
        else:
            baselines.append(setting.rise(text))
        fall = setting.fall(text)
    return baselines, baselines[-1] + fall


def arrange(
    source: Source, rows: list[Row], font: str, height: int, width: int, *, border: bool = False
) -> Page | None:
    """Places rows from top to bottom at a random size, pitch and offset; `border` frames them.

    Returns None where they fit at no legible size.
    """
    scale = page_scale(height, width)
    gap = round(3 * scale)  # between text and border
    pad = gap + 1 if border else 1
    margins = [round(source.uniform(1, 5) * scale) + pad for _ in range(2)]
    first, last = margins[0], width - margins[1]
    wanted = source.pick(SIZES)
    sizes = [wanted, *(size for size in reversed(SIZES) if size < wanted)]
    spacings = (round(scale), 0) if source.chance(0.25) else (0,)
    for spacing, size in itertools.product(spacings, sizes):
        types = [Type(font, size * scale * each.scale, spacing) for each in rows]
        starts = [_spread(each.cells, setting, last - first) for each, setting in zip(rows, types, strict=True)]
        if None in starts:
            continue
        baselines, end = _baselines(rows, types)
        free = height - 2 * pad - end
        if free >= 0:
            break
    else:
        return None

    stretch = min(free * source.rng.random() / len(rows), 0.6 * size * scale)
    top = pad + int(source.uniform(0, free - stretch * (len(rows) - 1)))
    runs: list[Run] = []
    strokes: list[Stroke] = []
    bottom = top  # of the ink so far
    for index, (each, setting) in enumerate(zip(rows, types, strict=True)):
        baseline = top + int(baselines[index] + index * stretch)
        text = "".join(cell.text for cell in each.cells)
        if each.rule and index:
            middle = (bottom + baseline - setting.rise(text)) // 2
            strokes.append(Stroke((first, middle, last - 1, middle)))
        for cell, start in zip(each.cells, starts[index], strict=True):
            runs.append(Run(cell.text, first + start, baseline, setting))
        bottom = baseline + setting.fall(text)
    if border:
        strokes.extend(frame(first - gap, top - gap, last + gap - 1, bottom + gap - 1))
    return Page(height, width, tuple(runs), tuple(strokes))


def render(source: Source, page: Page) -> Image.Image:
    """Draws the page in grey ("L"): random paper, ink, shading, softness and noise, all legible; or plain."""
    ink_strength = source.uniform(0.62, 1.0)
    canvas = np.zeros((page.height, page.width), np.uint8)
    faintness = source.uniform(0.4, 1.0)
    for stroke in page.strokes:
        x0, y0, x1, y1 = stroke.box
        canvas[y0 : y1 + 1, x0 : x1 + 1] = round(255 * stroke.shade * faintness)
    for run in page.runs:
        for x, y, ink in run.ink():
            place = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
            np.maximum(place, ink, out=place)
    if page.plain:
        return Image.fromarray(255 - canvas)
    if source.chance(0.2):
        blur = ImageFilter.GaussianBlur(source.uniform(0.25, 0.45))
        canvas = np.asarray(Image.fromarray(canvas).filter(blur))

    paper = source.uniform(205, 255)
    ink = canvas.astype(np.float32) * np.float32(paper * ink_strength / 255)
    pixels = np.float32(paper) - ink
    if source.chance(0.3):  # light from one side
        slope = np.linspace(-1, 1, page.width, dtype=np.float32) * np.float32(source.uniform(-10, 10))
        pixels += slope if source.chance(0.5) else np.resize(slope, page.height)[:, None]
    if source.chance(0.7):
        sigma = np.float32(source.uniform(0, 8))
        pixels += sigma * source.rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
