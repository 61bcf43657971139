"""Examples -> rows of fixed capacity -> Batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from vishwamai.data.batch import Batch


@dataclass(frozen=True)
class Example:
    """One thing to learn from, before it shares a row with others.

    tokens:        ids
    loss_weights:  weight of predicting each token; the first has nothing before it to be predicted from
    feature_index: which of the example's own image features stands at a token; -1 is text
    images:        the patches of each image (P C), in the order of the features
    positions:     (row, column) of each patch of each image; None: every image is a whole grid
    """

    tokens: Int32[np.ndarray, " T"]
    loss_weights: Float32[np.ndarray, " T"]
    feature_index: Int32[np.ndarray, " T"] | None = None
    images: tuple[UInt8[np.ndarray, "P C"], ...] = ()
    positions: tuple[Int32[np.ndarray, "P 2"], ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(tokens, patches) that it takes of a row."""
        return len(self.tokens), sum(len(pixels) for pixels in self.images)


@dataclass(frozen=True)
class ImageLayout:
    """The images of a batch, all of one size: a grid of patches, and how many patches share a feature."""

    rows: int
    columns: int
    patch_features: int
    patches_per_feature: int = 1

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Features, that is tokens, of one image."""
        return self.patches // self.patches_per_feature

    @property
    def positions(self) -> Int32[np.ndarray, "P 2"]:
        """(row, column) of each patch, in row-major order."""
        return np.stack(np.divmod(np.arange(self.patches, dtype=np.int32), self.columns), axis=-1)


@dataclass(frozen=True)
class Capacity:
    """What a row holds: T tokens, P patches, and of which images; no `image` means text only."""

    tokens: int
    patches: int = 0
    image: ImageLayout | None = None


def first_fit(lengths: Int[np.ndarray, "N 2"], capacity: Capacity) -> Int32[np.ndarray, " N"]:
    """The row of each example: the first with room for its tokens and its patches, or a new one.

    Raises ValueError when an example fits no row.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    if len(lengths) and (lengths.max(axis=0) > (capacity.tokens, capacity.patches)).any():
        raise ValueError(f"an example needs more than a row's {capacity.tokens} tokens and {capacity.patches} patches")
    row_of = np.zeros(len(lengths), np.int32)
    tokens, patches = np.full(len(lengths), capacity.tokens), np.full(len(lengths), capacity.patches)
    least_tokens, least_patches = lengths.min(axis=0, initial=max(capacity.tokens, capacity.patches))
    first, rows = 0, 0  # rows before `first` are too full for anything
    for index, (need_tokens, need_patches) in enumerate(lengths):
        fits = (tokens[first:rows] >= need_tokens) & (patches[first:rows] >= need_patches)
        row = first + int(fits.argmax()) if fits.any() else rows
        rows = max(rows, row + 1)
        row_of[index] = row
        tokens[row] -= need_tokens
        patches[row] -= need_patches
        while first < rows and (tokens[first] < least_tokens or patches[first] < least_patches):
            first += 1
    return row_of


def collate(rows: Sequence[Sequence[Example]], capacity: Capacity) -> Batch:
    """A batch with one row per list of examples. Raises ValueError when a row doesn't fit its capacity."""
    shape, image = (len(rows), capacity.tokens), capacity.image
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    loss_weights, feature_index = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
    if image is not None:
        patches = np.zeros((len(rows), capacity.patches, image.patch_features), np.uint8)
        patch_segment_ids = np.zeros((len(rows), capacity.patches), np.int32)
        patch_positions = np.zeros((len(rows), capacity.patches, 2), np.int32)
        grid = image.positions

    for b, examples in enumerate(rows):
        used, placed, shown = 0, 0, 0
        for segment, example in enumerate(examples, start=1):
            end = used + len(example.tokens)
            if end > capacity.tokens:
                raise ValueError(f"row {b} holds {capacity.tokens} tokens, its examples need {end} or more")
            tokens[b, used:end] = example.tokens
            positions[b, used:end] = np.arange(end - used)
            segment_ids[b, used:end] = segment
            loss_weights[b, used:end] = example.loss_weights
            loss_weights[b, used] = 0
            if example.feature_index is not None and image is not None:
                index = example.feature_index
                feature_index[b, used:end] = np.where(index >= 0, index + placed // image.patches_per_feature, -1)
            used = end
            for i, pixels in enumerate(example.images):
                if image is None or placed + len(pixels) > capacity.patches:
                    raise ValueError(f"row {b} holds {capacity.patches} patches, its images need more")
                at = slice(placed, placed + len(pixels))
                patches[b, at] = pixels
                patch_positions[b, at] = grid if example.positions is None else example.positions[i]
                placed, shown = at.stop, shown + 1
                patch_segment_ids[b, at] = shown

    text = Batch(tokens=tokens, positions=positions, segment_ids=segment_ids, loss_weights=loss_weights)
    if image is None:
        return text
    return Batch(
        **text.as_dict(),
        patches=patches,
        patch_segment_ids=patch_segment_ids,
        patch_positions=patch_positions,
        feature_index=feature_index,
        grid=(image.rows, image.columns),
    )
