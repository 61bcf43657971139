"""Images of every sort, PDFs, and what is said about broken ones; pixels and patches against Transformers."""

import io
import random
import struct
import zlib

import numpy as np
import pypdfium2 as pdfium
import pytest
from PIL import Image, ImageOps

from parsit_jax.documents.images import ImageError, is_pdf, load_image, pages
from parsit_jax.documents.patches import image_layout, patchify, preprocess
from parsit_jax.models.config import ParsitConfig, Pooling, VisionConfig
from vishwamai.models.config import TextConfig

RED, WHITE = (255, 0, 0), (255, 255, 255)


def colours(width=40, height=30):
    """Smooth, coloured, and different at every corner."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1).astype(np.uint8)
    )


def close(image, expected, tolerance):
    assert image.mode == "RGB" and image.size == expected.size
    return np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.jpg"])
def test_plain_formats(tmp_path, name):
    colours().save(tmp_path / name, lossless=True, quality=95, subsampling=0)
    assert close(load_image(tmp_path / name), colours(), 8 if name == "a.jpg" else 0)


@pytest.mark.parametrize("name", ["a.tiff", "a.jpg"])
def test_cmyk(tmp_path, name):
    colours().convert("CMYK").save(tmp_path / name, quality=95, subsampling=0)
    assert close(load_image(tmp_path / name), colours(), 12 if name == "a.jpg" else 1)


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        (np.asarray([[0, 257, 32896, 65535]], np.uint16), "a.png", [0, 1, 128, 255]),
        (np.asarray([[0, 257, 32896, 65535]], np.uint16), "a.tiff", [0, 1, 128, 255]),
        (np.asarray([[0, 0, 0, 300]], np.uint16), "a.png", [0, 0, 0, 1]),  # dark stays dark
        (np.asarray([[0, 257, 32896, 65535]], np.int32), "a.tiff", [0, 1, 128, 255]),
        (np.asarray([[0, 1, 128, 255]], np.int32), "a.tiff", [0, 1, 128, 255]),
        (np.asarray([[0, 0.25, 0.5, 1]], np.float32), "a.tiff", [0, 64, 128, 255]),
    ],
)
def test_deep_greys(tmp_path, values, name, expected):
    Image.fromarray(values).save(tmp_path / name)
    assert np.asarray(load_image(tmp_path / name))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
    from PIL.Image import Transpose

    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    undo |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = colours() if orientation == 1 else colours().transpose(Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert close(load_image(tmp_path / "a.png"), colours(), 0)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert close(load_image(tmp_path / "a.gif"), frames[0], 0)
    with Image.open(tmp_path / "a.gif") as opened:
        opened.seek(1)  # whoever opened it may have chosen another
        assert close(load_image(opened), frames[1], 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    if mode == "RGB":  # one colour is declared transparent
        Image.new("RGB", (4, 1), RED).save(tmp_path / "a.png", transparency=RED)
        assert close(load_image(tmp_path / "a.png"), Image.new("RGB", (4, 1), WHITE), 0)
        return
    image.convert(mode).save(tmp_path / "a.png")
    loaded = np.asarray(load_image(tmp_path / "a.png"))
    assert loaded[0, 0].tolist() == [0, 0, 0] and (loaded[0, 1:] == 255).all()


def test_half_transparent_is_mixed_with_white():
    loaded = load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert abs(int(np.asarray(loaded)[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("mode", ["1", "L", "HSV", "YCbCr", "P"])
def test_other_modes_of_opened_images(mode):
    assert load_image(colours().convert(mode)).mode == "RGB"


def png_header(width, height):
    """A PNG that says its size and holds nothing."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def damaged(kind, size):
    file = io.BytesIO()
    random.seed(0)
    Image.frombytes("RGB", (64, 64), random.randbytes(64 * 64 * 3)).save(file, kind)
    return file.getvalue()[:size]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no image file"),
        (b"", "empty file"),
        (b"hello world", r"no image in a known format .* b'hello wo'"),
        (png_header(8, 8)[:33], "damaged"),
        (damaged("PNG", 4000), "truncated or damaged"),
        (damaged("JPEG", 3000), "truncated or damaged"),
        (png_header(0, 10), r"damaged|known format"),
        (png_header(20_000, 100), r"20000 x 100 pixels, at most 16,384"),
        (png_header(100, 20_000), r"100 x 20000 pixels, at most 16,384"),
        (png_header(20_000, 20_000), "million pixels, at most"),
        (png_header(16_000, 16_000), "million"),
    ],
)
def test_broken_images_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "page.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as error:
        load_image(path)
    assert str(path) in str(error.value)


def test_an_opened_image_that_is_truncated(tmp_path):
    (tmp_path / "page.jpg").write_bytes(damaged("JPEG", 3000))
    with Image.open(tmp_path / "page.jpg") as opened, pytest.raises(ImageError, match="the image .*truncated"):
        load_image(opened)


def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch):
    def stumble(image):
        raise struct.error("unpack requires a buffer of 2 bytes")

    colours().save(tmp_path / "page.png")
    monkeypatch.setattr(ImageOps, "exif_transpose", stumble)
    with pytest.raises(ImageError, match=r"page\.png can't be decoded.*2 bytes"):
        load_image(tmp_path / "page.png")


def test_a_folder_and_an_image_without_pixels(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        load_image(Image.new("RGB", (0, 5)))


def pdf(path, count=3, **options):
    frames = [Image.new("RGB", (144, 72), (40 * i, 0, 0)) for i in range(count)]
    frames[0].save(path, "PDF", save_all=True, append_images=frames[1:], resolution=72, **options)
    return path


def test_pages_of_a_pdf(tmp_path):
    path = pdf(tmp_path / "a.pdf")
    assert is_pdf(path)
    found = list(pages(path))
    assert [image.size for image in found] == [(288, 144)] * 3
    assert [image.getpixel((100, 100))[0] // 40 for image in found] == [0, 1, 2]
    (second,) = pages(path, [2], dpi=36)
    assert second.size == (72, 36) and abs(second.getpixel((30, 20))[0] - 40) <= 2
    with pytest.raises(ImageError, match="is a PDF, expected an image"):
        load_image(path)


def test_files_are_closed_even_when_not_all_pages_are_taken(tmp_path, monkeypatch):
    opened, closed = [], []

    class Recorded(pdfium.PdfDocument):
        def __init__(self, path):
            opened.append(path)
            super().__init__(path)

        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr(pdfium, "PdfDocument", Recorded)
    drawn = pages(pdf(tmp_path / "a.pdf"))
    next(drawn)
    drawn.close()
    assert len(list(pages(tmp_path / "a.pdf"))) == 3
    assert opened and len(closed) == len(opened)


def raw_pdf(objects, trailer=""):
    """A PDF of numbered objects, of which the first is the catalog."""
    text, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(text))
        text += f"{number} 0 obj{body}endobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    text += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    text += f"trailer<</Size {len(objects) + 1}/Root 1 0 R{trailer}>>\n"
    return text + f"startxref\n{text.index('xref')}\n%%EOF"


def test_what_was_filled_into_a_pdf_form_is_drawn(tmp_path):
    ink = "0 g 0 0 50 20 re f"
    objects = [
        "<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]>>>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]/Annots[4 0 R]>>",
        "<</Type/Annot/Subtype/Widget/FT/Tx/T(total)/V(x)/F 4/Rect[10 10 60 30]/P 3 0 R/AP<</N 5 0 R>>>>",
        f"<</Type/XObject/Subtype/Form/BBox[0 0 50 20]/Length {len(ink)}>>stream\n{ink}\nendstream\n",
    ]
    (tmp_path / "a.pdf").write_text(raw_pdf(objects))
    (page,) = pages(tmp_path / "a.pdf", dpi=72)
    dark = np.asarray(page)[:, :, 0] < 50
    assert dark.sum() == 50 * 20 and dark[70:90, 10:60].all()


@pytest.mark.parametrize("numbers", [[0], [1, 4], [-1]])
def test_pages_that_are_not_there(tmp_path, numbers):
    path = pdf(tmp_path / "a.pdf")
    with pytest.raises(ImageError, match="has pages 1 to 3, found page"):
        pages(path, numbers)


def test_broken_pdfs(tmp_path):
    with pytest.raises(ImageError, match="no PDF file"):
        pages(tmp_path / "a.pdf")
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n garbage")
    with pytest.raises(ImageError, match="can't be opened as a PDF"):
        pages(tmp_path / "a.pdf")
    with pytest.raises(ImageError, match="pixels, at most"):
        list(pages(pdf(tmp_path / "b.pdf"), dpi=72 * 200))


def test_a_pdf_with_a_password(tmp_path):
    # The smallest file whose trailer demands a password: the standard handler, with keys that fit none.
    key = "00" * 32
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>",
        f"<</Filter/Standard/V 1/R 2/O<{key}>/U<{key}>/P -1>>",
    ]
    (tmp_path / "a.pdf").write_text(raw_pdf(objects, "/Encrypt 4 0 R/ID[<00><00>]"))
    with pytest.raises(ImageError, match="encrypted, save it without a password"):
        pages(tmp_path / "a.pdf")


def test_real_pdfs_and_scans(shared):
    assert len(list(pages(shared / "invoice2data" / "pdf" / "QualityHosting.pdf", dpi=20))) >= 2
    assert load_image(shared / "invoice2data" / "img" / "oyo_p1.jpg").mode == "RGB"


@pytest.mark.parametrize(("width", "height"), [(384, 384), (13, 7), (500, 31), (1, 1), (200, 900)])
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_pixels_equal_siglip_image_processor(width, height, size):
    transformers = pytest.importorskip("transformers", reason="parity needs Transformers (extra [test])")
    processor = transformers.SiglipImageProcessor(size={"height": size[0], "width": size[1]})
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    for image in (Image.fromarray(noise), colours(width, height), Image.fromarray(noise).convert("L")):
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        ours = preprocess(image, *size).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(theirs - ours).max() <= 1 / 255


@pytest.mark.parametrize(("height", "width", "patch"), [(32, 48, 16), (30, 43, 14)])
def test_patches_are_what_a_convolution_sees(height, width, patch):
    torch = pytest.importorskip("torch", reason="parity needs torch (extra [test])")
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    weight = torch.randn(5, 3, patch, patch, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = torch.tensor(pixels).permute(2, 0, 1)[None].double()
    theirs = torch.nn.functional.conv2d(image, weight, stride=patch)[0].flatten(1).T.numpy()
    ours = patchify(pixels, patch).astype(np.float64) @ weight.reshape(5, -1).T.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def model(pooling=Pooling.NONE):
    text = TextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                      num_key_value_heads=1, head_dim=8)  # fmt: skip
    vision = VisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                          image_size=64, patch_size=16)  # fmt: skip
    return ParsitConfig(text=text, vision=vision, image_token_id=1, pooling=pooling)


def test_image_layouts():
    layout = image_layout(model(), 33, 64)
    assert (layout.rows, layout.columns, layout.patches, layout.tokens) == (2, 4, 8, 8)
    assert layout.patch_features == 16 * 16 * 3
    assert image_layout(model(Pooling.AVERAGE_2X2), 64, 64).tokens == 4
    with pytest.raises(ValueError, match="even grid"):
        image_layout(model(Pooling.AVERAGE_2X2), 48, 64)
    with pytest.raises(ValueError, match="holds no patch"):
        image_layout(model(), 15, 64)
