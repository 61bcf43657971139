"""The one batch type: every array leads with the same row dimension B."""

from dataclasses import dataclass, field, fields

import jax
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of packed examples; text, one image, many images and packed rows are one program.

    tokens:            int32 B T
    positions:         int32 B T    restart at 0 in each segment
    segment_ids:       int32 B T    0 is padding, examples of a row are 1, 2, ...
    loss_weights:      float32 B T  weight of predicting tokens[b, t] from what stands before it
    patches:           uint8 B P C  raw pixels in (channel, row, column) order, or float32 already normalised
    patch_segment_ids: int32 B P    0 is padding, images of a row are 1, 2, ...
    patch_positions:   int32 B P 2  (row, column) in the patch grid
    feature_index:     int32 B T    which of the row's P image features stands at this token; -1 is text
    grid:              (rows, columns) of patches that every image has; None means the position table's own
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    loss_weights: Array
    patches: Array | None = None
    patch_segment_ids: Array | None = None
    patch_positions: Array | None = None
    feature_index: Array | None = None
    grid: tuple[int, int] | None = field(default=None, metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def as_dict(self) -> dict[str, Array]:
        """The arrays that are there, by name (what `numpy.savez` takes)."""
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "grid"}
        return {name: array for name, array in named.items() if array is not None}


def text_batch(tokens: Array, attention_mask: Array | None = None) -> Batch:
    """A batch of whole rows, one example each; `attention_mask` (B T, 0 = padding, on either side) as Transformers."""
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2:
        raise ValueError(f"token ids must have shape B T, found {tokens.shape}")
    there = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if there.shape != tokens.shape:
        raise ValueError(f"attention_mask has shape {there.shape}, token ids have {tokens.shape}")
    # Counted from the first token that is there: a gap in the mask is hidden, and keeps its places.
    start = np.argmax(there, axis=1)
    positions = np.maximum(np.arange(tokens.shape[1], dtype=np.int32) - start[:, None], 0).astype(np.int32)
    weights = there.astype(np.float32)
    return Batch(tokens=tokens, positions=positions, segment_ids=there.astype(np.int32), loss_weights=weights)
