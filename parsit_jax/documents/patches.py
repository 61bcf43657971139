"""Pixels -> patches, as SigLIP's image processor and patch convolution take them."""

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from parsit_jax.models.config import ParsitConfig, Pooling
from vishwamai.config import ConfigError
from vishwamai.data.packing import ImageLayout


def preprocess(image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """The RGB image at the model's size, bicubic, its proportions not kept (`SiglipImageProcessor`).

    The model itself maps 0..255 to -1..1.
    """
    image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def patchify(pixels: UInt8[np.ndarray, "H W 3"], patch_size: int) -> UInt8[np.ndarray, "P C"]:
    """Patches in row-major order, each as (channel, row, column).

    That is the order of a convolution weight `D 3 p p` flattened to `D C`. Like the convolution it leaves out the
    pixels at the right and the bottom that fill no patch.
    """
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    whole = pixels[: rows * patch_size, : columns * patch_size]
    blocks = whole.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(blocks).reshape(rows * columns, 3 * patch_size**2)


def inked(patches: UInt8[np.ndarray, "P C"], contrast: int = 60) -> Bool[np.ndarray, " P"]:
    """Which patches hold more than paper: their darkest and lightest pixel differ by more than `contrast`."""
    return patches.max(axis=1).astype(int) - patches.min(axis=1) > contrast


def image_size(config: ParsitConfig, chosen: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) that images are brought to: the chosen one, or the square of the position table."""
    return chosen or (config.vision.image_size, config.vision.image_size)


def image_layout(config: ParsitConfig, height: int, width: int) -> ImageLayout:
    """The patch grid of an image of this size, and how many tokens it takes in the language model.

    Raises ConfigError for a size that holds no patch, or a grid that the pooling can't halve.
    """
    patch = config.vision.patch_size
    rows, columns = height // patch, width // patch
    if not rows or not columns:
        raise ConfigError(f"an image of {height} x {width} pixels holds no patch of {patch}: enlarge data.image_size")
    pooled = config.pooling is Pooling.AVERAGE_2X2
    if pooled and (rows % 2 or columns % 2):
        raise ConfigError(
            f"{config.pooling.value} pooling needs an even grid, {height} x {width} pixels make {rows} x "
            f"{columns} patches of {patch}: set data.image_size to multiples of {2 * patch}"
        )
    return ImageLayout(rows, columns, config.vision.patch_features, 4 if pooled else 1)
