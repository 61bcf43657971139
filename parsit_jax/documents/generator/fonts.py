"""The fonts that pages are drawn with, all from pip packages, and which of them training never sees."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from parsit_jax.documents.generator.document import Split


@dataclass(frozen=True)
class Font:
    """One font file of a pip package.

    `scale` evens out how large fonts of one nominal size look: at 10 pixels, capitals are about 7 high.
    """

    file: str
    package: str
    split: Split
    scale: float


_FOLDERS = {
    "matplotlib": ("matplotlib", "mpl-data/fonts/ttf"),
    "font-roboto": ("font_roboto", "files"),
    "font-source-sans-pro": ("font_source_sans_pro", "files"),
    "font-source-serif-pro": ("font_source_serif_pro", "files"),
    "font-lato": ("font_lato", "files"),
    "font-caladea": ("font_caladea", "files"),
}

FONTS = {
    "DejaVuSans": Font("DejaVuSans.ttf", "matplotlib", Split.TRAIN, 0.95),
    "DejaVuSans-Bold": Font("DejaVuSans-Bold.ttf", "matplotlib", Split.TRAIN, 0.93),
    "DejaVuSansMono": Font("DejaVuSansMono.ttf", "matplotlib", Split.TRAIN, 0.95),
    "DejaVuSansMono-Bold": Font("DejaVuSansMono-Bold.ttf", "matplotlib", Split.TRAIN, 0.95),
    "DejaVuSerif": Font("DejaVuSerif.ttf", "matplotlib", Split.TRAIN, 0.95),
    "Roboto-Regular": Font("Roboto-Regular.ttf", "font-roboto", Split.TRAIN, 1.0),
    "Roboto-Medium": Font("Roboto-Medium.ttf", "font-roboto", Split.TRAIN, 1.0),
    "Roboto-Bold": Font("Roboto-Bold.ttf", "font-roboto", Split.TRAIN, 1.0),
    "SourceSansPro-Regular": Font("SourceSansPro-Regular.ttf", "font-source-sans-pro", Split.TRAIN, 1.12),
    "SourceSansPro-Semibold": Font("SourceSansPro-Semibold.ttf", "font-source-sans-pro", Split.TRAIN, 1.12),
    "SourceSerifPro-Regular": Font("SourceSerifPro-Regular.ttf", "font-source-serif-pro", Split.TRAIN, 1.1),
    "SourceSerifPro-Semibold": Font("SourceSerifPro-Semibold.ttf", "font-source-serif-pro", Split.TRAIN, 1.1),
    "Lato-Regular": Font("Lato-Regular.ttf", "font-lato", Split.HELD_OUT, 1.05),
    "Caladea-Regular": Font("Caladea-Regular.ttf", "font-caladea", Split.HELD_OUT, 1.12),
}


def fonts_of(split: Split) -> tuple[str, ...]:
    """Names of the fonts that pages of `split` are drawn with."""
    return tuple(name for name, font in FONTS.items() if font.split is split)


@cache
def font_path(name: str) -> Path:
    """Where the font file lies.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the package that brings it is not installed.
    """
    if name not in FONTS:
        raise ValueError(f"unknown font {name!r}: choose one of {', '.join(FONTS)}")
    font = FONTS[name]
    module, folder = _FOLDERS[font.package]
    spec = importlib.util.find_spec(module)  # finds without importing: matplotlib takes a second to import
    path = Path(spec.origin).parent / folder / font.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"font {name} ({font.file}) not found: pip install {font.package}")
    return path


_THIN = ".,:;'"


@dataclass(frozen=True)
class Glyph:
    """A drawn character: its ink (uint8, height x width), the ink's offset from the pen, the pen's step."""

    ink: np.ndarray
    left: int
    top: int
    advance: int


@cache
def _load_font(name: str, size: float) -> ImageFont.FreeTypeFont:
    path = font_path(name)
    return ImageFont.truetype(str(path), size * FONTS[name].scale, layout_engine=ImageFont.Layout.BASIC)


@cache
def glyph(name: str, size: float, character: str) -> Glyph:
    """The character at `size` pixels, times the font's own scale.

    Drawn one by one because kerning rounded to whole pixels swallows spaces and the points of small numbers.
    """
    font = _load_font(name, size)
    x0, y0, x1, y1 = (int(edge) for edge in font.getbbox(character, anchor="ls"))
    canvas = Image.new("L", (max(0, x1 - x0), max(0, y1 - y0)))
    if canvas.width and canvas.height:
        ImageDraw.Draw(canvas).text((-x0, -y0), character, fill=255, font=font, anchor="ls")
    # Some fonts tell too short a step for a few signs (Source Serif's %): the ink must end within a pixel of it.
    advance = max(font.getlength(character), x0 + canvas.width - 1)
    if character == " ":
        advance = max(advance, 0.3 * size)
    elif character in _THIN:  # a clear column on both sides, or 18.08 looks like 1808
        x0 = max(x0, 1)
        advance = max(advance, x0 + canvas.width + 1)
    return Glyph(np.asarray(canvas), x0, y0, round(advance))
