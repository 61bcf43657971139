"""Files -> page images: whatever a scanner or a phone makes, or an error that says what is wrong."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

import numpy as np
import pypdfium2 as pdfium
from PIL import Image, ImageOps, UnidentifiedImageError

# Beyond these a file is a mistake or a bomb: A3 at 600 dpi has 70 million pixels.
MAX_SIDE, MAX_PIXELS = 16_384, 89_000_000

# PDFium keeps global state: one call at a time, whatever the thread. Reentrant, because an abandoned iterator over
# pages closes its file whenever it is collected.
_pdfium = RLock()


class ImageError(ValueError):
    """An image or PDF that can't be read; the message says which, what was found and what to do."""


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """An RGB image from a file or an opened image: upright, on white, 8 bits a channel.

    Of several frames a file gives the first, an opened image the one where it stands.

    Raises ImageError: missing, empty, truncated, not an image, a PDF, without pixels or too large.
    """
    if isinstance(source, Image.Image):
        with _decoding("the image"):
            return _rgb(source, "the image")
    path = Path(source)
    if not path.is_file():
        raise ImageError(
            f"no image file {path}" if not path.is_dir() else f"{path} is a folder, expected an image file"
        )
    if not path.stat().st_size:
        raise ImageError(f"{path} is an empty file (0 bytes): the copy or download failed")
    if is_pdf(path):
        raise ImageError(
            f"{path} is a PDF, expected an image: ParsitInference.analyze_document reads PDFs; to train on "
            "its pages, save them as images with parsit_jax.documents.images.pages"
        )
    with _decoding(str(path)):
        try:
            image = Image.open(path)
        except Image.DecompressionBombError:
            raise ImageError(_too_large(str(path), f"over {2 * MAX_PIXELS // 10**6} million pixels")) from None
        except UnidentifiedImageError:
            with path.open("rb") as file:
                start = file.read(8)
            raise ImageError(
                f"{path} is damaged or no image in a known format (it starts with {start!r}): save it as PNG or JPEG"
            ) from None
        with image:
            return _rgb(image, str(path))


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # a decoder raises whatever the damage makes it stumble over
        raise ImageError(f"{name} can't be decoded, it is truncated or damaged: {error}") from error


def is_pdf(path: str | Path) -> bool:
    """Whether a file is a PDF by its content (the mark may stand a little behind the start)."""
    with Path(path).open("rb") as file:
        return b"%PDF-" in file.read(1024)


def pages(path: str | Path, numbers: Sequence[int] | None = None, dpi: float = 144) -> Iterator[Image.Image]:
    """The pages of a PDF as RGB images, drawn one at a time: all, or those of the given `numbers` (from 1).

    Raises ImageError: missing, encrypted, broken, without pages, a number out of range (all of that before a
    page is drawn); a page too large for `dpi`, or that can't be drawn.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"no PDF file {path}")
    with _opened(path) as document, _pdfium:
        count = len(document)
    numbers = range(1, count + 1) if numbers is None else numbers
    if not numbers:
        raise ImageError(f"no pages are taken from {path}, which has {count}")
    for number in numbers:
        if not 1 <= number <= count:
            raise ImageError(f"{path} has pages 1 to {count}, found page {number}")
    return _drawn(path, numbers, dpi)


@contextmanager
def _opened(path: Path) -> Iterator[pdfium.PdfDocument]:
    with _pdfium:
        try:
            document = pdfium.PdfDocument(path)
            document.init_forms()  # without it, what was filled into a form is not drawn
        except pdfium.PdfiumError as error:
            why = "it is encrypted, save it without a password" if "password" in str(error).lower() else str(error)
            raise ImageError(f"{path} can't be opened as a PDF: {why}") from error
    try:
        yield document
    finally:
        with _pdfium:
            document.close()


def _drawn(path: Path, numbers: Sequence[int], dpi: float) -> Iterator[Image.Image]:
    with _opened(path) as document:
        for number in numbers:
            yield _rendered(document, number, dpi, f"page {number} of {path}")


def _rendered(document: pdfium.PdfDocument, number: int, dpi: float, name: str) -> Image.Image:
    with _pdfium:
        try:
            page = document[number - 1]
            try:
                width, height = (round(points * dpi / 72) for points in page.get_size())
                _check_size(width, height, f"{name} at {dpi:g} dpi")
                return page.render(scale=dpi / 72).to_pil().convert("RGB")
            finally:
                page.close()
        except pdfium.PdfiumError as error:
            raise ImageError(f"{name} can't be drawn: {error}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels: there is nothing to see")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(_too_large(name, f"{width} x {height} pixels"))


def _too_large(name: str, found: str) -> str:
    return (
        f"{name} has {found}, at most {MAX_SIDE:,} on a side and {MAX_PIXELS // 10**6} million in all are "
        "read: scale it down or cut it into pages"
    )


def _rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(*image.size, name)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floats, as 8 bits: what is white there is white here."""
    pixels = np.asarray(image, np.float64)
    peak = np.nan_to_num(pixels).max()
    if image.mode.startswith("I;16"):
        white = 65535
    else:  # the mode doesn't say how far its values go
        white = 1 if image.mode == "F" and peak <= 1 else 255 if peak <= 255 else max(65535, peak)
    return Image.fromarray(np.rint(np.clip(np.nan_to_num(pixels) * (255 / white), 0, 255)).astype(np.uint8))
