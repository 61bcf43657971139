"""`Parsit.from_pretrained(folder)(input_ids, pixel_values)`: logits as LlavaForConditionalGeneration's."""

import dataclasses

import numpy as np
from jaxtyping import Array, Float, Int

from parsit_jax.documents.patches import patchify
from parsit_jax.models.config import ParsitConfig, Pooling, VisionConfig
from parsit_jax.models.parsit import ParsitModel
from vishwamai.data.batch import Batch, text_batch
from vishwamai.pretrained import Pretrained, checked_ids


class Parsit(Pretrained):
    """A document model with its weights. Attributes and `from_pretrained` as `vishwamai.VishwamAI`'s."""

    accepts = ParsitModel

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        pixel_values: Float[Array, "I 3 height width"] | None = None,
        attention_mask: Int[Array, "B T"] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the token after each position.

        Args:
            input_ids: with as many image tokens as each image has features, in one run or several.
            pixel_values: normalised images in the order in which their tokens stand, row by row; rows may hold
                different numbers of images.
            attention_mask: 0 where there is padding, on either side.
            interpolate_pos_encoding: take images of another size than the model's, with positions resized to it.

        Raises:
            ValueError: image tokens and images that do not fit, an image of another size, ids outside the vocabulary.
        """
        ids = checked_ids(input_ids, self.config.text.vocab_size)
        batch = text_batch(ids, attention_mask)
        if pixel_values is None or not len(pixel_values):
            if count := int((ids == self.config.image_token_id).sum()):
                raise ValueError(f"input_ids holds {count} image tokens, but there are no pixel_values")
            return self.logits(batch)
        return self.logits(with_images(batch, np.asarray(pixel_values), self.config, interpolate_pos_encoding))


def with_images(
    batch: Batch,
    pixel_values: Float[np.ndarray, "I 3 height width"],
    config: ParsitConfig,
    any_size: bool = False,
) -> Batch:
    """The batch with normalised images dealt to its rows, as many as each row's image tokens ask for."""
    patches, grid = to_patches(pixel_values, config.vision)
    own = (config.vision.grid, config.vision.grid)
    if grid != own and not any_size:
        height, width = pixel_values.shape[2:]
        raise ValueError(
            f"pixel_values are {height} x {width} pixels ({grid[0]} x {grid[1]} patches), the model's positions stand "
            f"for {own[0]} x {own[1]} patches: resize the images, or pass interpolate_pos_encoding=True"
        )
    per_image = grid[0] * grid[1] // (4 if config.pooling is Pooling.AVERAGE_2X2 else 1)
    marks = batch.tokens == config.image_token_id
    counts = marks.sum(axis=1)
    if (counts % per_image).any() or counts.sum() != per_image * len(patches):
        raise ValueError(
            f"the rows of input_ids hold {counts.tolist()} image tokens; {len(patches)} images of {per_image} features "
            f"each need {per_image * len(patches)}, a multiple of {per_image} in each row"
        )
    images = counts // per_image  # of each row
    capacity, cells = int(images.max()), grid[0] * grid[1]
    dealt = np.zeros((batch.rows, capacity, *patches.shape[1:]), patches.dtype)
    there = np.arange(capacity) < images[:, None]
    dealt[there] = patches
    cell = np.stack(np.divmod(np.arange(cells, dtype=np.int32), grid[1]), axis=-1)
    segments = np.where(there, np.arange(1, capacity + 1), 0)
    return dataclasses.replace(
        batch,
        patches=dealt.reshape(batch.rows, -1, patches.shape[-1]),
        patch_segment_ids=np.repeat(segments, cells, axis=1).astype(np.int32),
        patch_positions=np.tile(cell, (batch.rows, capacity, 1)),
        feature_index=np.where(marks, np.cumsum(marks, axis=1) - 1, -1).astype(np.int32),
        grid=grid,
    )


def to_patches(
    pixel_values: Float[np.ndarray, "I 3 height width"], config: VisionConfig
) -> tuple[Float[np.ndarray, "I P C"], tuple[int, int]]:
    """Patches of normalised images in row-major order, and their (rows, columns)."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels or pixel_values.dtype.kind != "f":
        raise ValueError(
            f"pixel_values must be normalised floats of shape (images, {config.num_channels}, height, width), found "
            f"{pixel_values.dtype} {pixel_values.shape}"
        )
    height, width = pixel_values.shape[2:]
    images = pixel_values.astype(np.float32).transpose(0, 2, 3, 1)
    grid = (height // config.patch_size, width // config.patch_size)
    if 0 in grid:
        raise ValueError(f"pixel_values of {height} x {width} pixels hold no patch of {config.patch_size}")
    return np.stack([patchify(image, config.patch_size) for image in images]), grid
