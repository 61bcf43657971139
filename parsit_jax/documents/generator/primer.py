"""The very first pages: one line of clean type of one font and size, in the same place or in ever freer ones.

A model that starts from nothing finds its way along such lines in minutes, and along varied pages not in an hour.
"""

import string

from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Split
from parsit_jax.documents.generator.page import Page, Run, Type
from parsit_jax.documents.generator.values import Source

LAYOUTS = {"first_line": tuple(Split), "on_grid": tuple(Split), "anywhere": tuple(Split)}
TRAIN_FONTS = ("DejaVuSansMono",)
_SIZE = 10.0
_LEFT, _BASELINE, _BELOW = 2, 11, 3  # of the first line; pixels below a baseline
_GRID = 8
_LONGEST = 14
_POOLS = (string.ascii_letters + string.digits + ".,-/ ", string.digits + ".,")


def compose_primer(source: Source, layout: str, font: str, height: int, width: int) -> Composition | None:
    """One to 14 random characters: at the top left, moved by multiples of 8 pixels, or anywhere."""
    pool = source.pick(_POOLS)
    text = "".join(source.pick(pool) for _ in range(source.integer(1, _LONGEST)))
    text = " ".join(text.split()) or "x"
    setting = Type(font, _SIZE)
    right, down = width - _LEFT - setting.width(text) - 1, height - _BASELINE - _BELOW
    if right < 0 or down < 0:
        return None
    step = {"first_line": 0, "on_grid": _GRID, "anywhere": 1}[layout]
    x = _LEFT + (step * source.integer(0, right // step) if step else 0)
    baseline = _BASELINE + (step * source.integer(0, down // step) if step else 0)
    return Composition(Page(height, width, (Run(text, x, baseline, setting),), (), plain=True))
