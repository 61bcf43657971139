"""Documents drawn on the fly, with questions and answers, to train on and (held out) to score with.

`generate` is a pure function of its arguments. Held-out documents share no value, font or, where a kind has
several, layout with training.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from parsit_jax.documents.generator import charts, forms, invoices, lines, primer, receipts, tables
from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Document, Question, Split
from parsit_jax.documents.generator.fonts import FONTS, fonts_of
from parsit_jax.documents.generator.page import render
from parsit_jax.documents.generator.values import ALPHABET, Source

__all__ = [
    "ALPHABET",
    "FONTS",
    "KINDS",
    "Document",
    "Question",
    "Split",
    "fonts_of",
    "generate",
    "layouts_of",
]

_ATTEMPTS = 200


@dataclass(frozen=True)
class _Kind:
    """How a kind composes a page, and in which splits each of its layouts appears."""

    compose: Callable[[Source, str, str, int, int], Composition | None]
    layouts: dict[str, tuple[Split, ...]]
    train_fonts: tuple[str, ...] = fonts_of(Split.TRAIN)


_KINDS = {
    "receipts": _Kind(receipts.compose_receipt, receipts.LAYOUTS),
    "slips": _Kind(receipts.compose_slip, receipts.SLIP_LAYOUTS),
    "invoices": _Kind(invoices.compose_invoice, invoices.LAYOUTS),
    "forms": _Kind(forms.compose_form, forms.LAYOUTS),
    "tables": _Kind(tables.compose_table, tables.LAYOUTS),
    "charts": _Kind(charts.compose_chart, charts.LAYOUTS),
    "plain_lines": _Kind(lines.compose_plain_line, lines.LAYOUTS),
    "lines": _Kind(lines.compose_lines, lines.LAYOUTS),
    "notes": _Kind(lines.compose_notes, lines.LAYOUTS),
    "primer": _Kind(primer.compose_primer, primer.LAYOUTS, primer.TRAIN_FONTS),
}

KINDS = tuple(_KINDS)


def layouts_of(kind: str, split: Split) -> tuple[str, ...]:
    """The layout families that documents of `kind` use in `split`."""
    return tuple(name for name, splits in _KINDS[kind].layouts.items() if split in splits)


def generate(
    kind: str,
    seed: int,
    split: Split,
    size: tuple[int, int] = (128, 128),
    *,
    layout: str | None = None,
    font: str | None = None,
) -> Document:
    """Draws one document, the same for the same arguments in every process.

    Args:
        kind: one of KINDS.
        seed: any integer from 0; another seed, another document.
        split: which values, layouts and fonts may appear.
        size: (height, width) in pixels; letters grow with the shorter side beyond 128.
        layout: a layout family to use whatever the split, to tell unseen layouts from unseen values.
        font: the same for fonts.

    Raises:
        ValueError: unknown kind, layout or font; a negative seed; a page too small for the kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of document {kind!r}: choose one of {', '.join(KINDS)}")
    if layout is not None and layout not in _KINDS[kind].layouts:
        raise ValueError(f"unknown layout {layout!r} of {kind}: choose one of {', '.join(_KINDS[kind].layouts)}")
    if font is not None and font not in FONTS:
        raise ValueError(f"unknown font {font!r}: choose one of {', '.join(FONTS)}")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative: seeds count from 0")
    height, width = size
    source = Source(np.random.default_rng([zlib.crc32(f"{kind} {split.value}".encode()), seed]), split)
    layout = layout or source.pick(layouts_of(kind, split))
    font = font or source.pick(_KINDS[kind].train_fonts if split is Split.TRAIN else fonts_of(split))
    for _ in range(_ATTEMPTS):
        made = _KINDS[kind].compose(source, layout, font, height, width)
        if made is not None:
            break
    else:
        raise ValueError(
            f"{kind} in layout {layout} do not fit a page of {height} x {width} pixels: make it larger "
            "(128 x 128 holds every kind)"
        )
    image = render(source, made.page)
    return Document(image, kind, layout, font, made.page.transcription, made.questions, made.fields)
