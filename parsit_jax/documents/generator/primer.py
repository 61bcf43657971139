"""The very first pages: one line of clean type, always of one font and size and in the same place.

A model that starts from nothing finds its way along such lines in minutes, and along varied pages not in an hour.
"""

import string

from parsit_jax.documents.generator.composition import Composition
from parsit_jax.documents.generator.document import Split
from parsit_jax.documents.generator.page import Page, Run, Type
from parsit_jax.documents.generator.values import Source

LAYOUTS = {"first_line": tuple(Split)}
TRAIN_FONTS = ("DejaVuSansMono",)
_SIZE = 10.0
_LONGEST = 14
_POOLS = (string.ascii_letters + string.digits + ".,-/ ", string.digits + ".,")


def compose_primer(source: Source, layout: str, font: str, height: int, width: int) -> Composition:
    """One to 14 random characters at the top left."""
    pool = source.pick(_POOLS)
    text = "".join(source.pick(pool) for _ in range(source.integer(1, _LONGEST)))
    text = " ".join(text.split()) or "x"
    return Composition(Page(height, width, (Run(text, 2, 11, Type(font, _SIZE)),), (), plain=True))
