"""Prompts -> a batch whose rows all end at the same place, in one of few shapes."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vishwamai.data.batch import Batch


class TooLongError(ValueError):
    """Prompts that leave no room for an answer. `reasons`: of each of these, by its place among the prompts."""

    def __init__(self, reasons: Mapping[int, str], advice: str):
        row, reason = next(iter(reasons.items()))
        super().__init__(f"conversation {row} {reason}: {advice}")
        self.reasons = reasons


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """A batch of prompts of unequal lengths. Raises ValueError for an empty one, or none at all."""
    if not len(prompts):
        raise ValueError("there is no prompt: expected at least one row of token ids")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty: a model continues at least one token")
    length = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt)
        tokens[row, start:], positions[row, start:], segment_ids[row, start:] = prompt, np.arange(len(prompt)), 1
    return Batch(tokens, positions, segment_ids, np.zeros(tokens.shape, np.float32))


def extended_left(batch: Batch, length: int) -> Batch:
    """The batch with padding in front, so that its rows have `length` tokens."""
    fill = {"tokens": 0, "positions": 0, "segment_ids": 0, "loss_weights": 0, "feature_index": -1}
    before = ((0, 0), (length - batch.tokens.shape[1], 0))
    changed = {
        name: np.pad(array, before, constant_values=fill[name])
        for name, array in batch.as_dict().items()
        if name in fill
    }
    return dataclasses.replace(batch, **changed)


def bucket(length: int) -> int:
    """The length rounded up to one of four per octave (64, 80, 96, 112, 128, 160, ...): each shape compiles anew."""
    step = max(8, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def right_aligned(batch: Batch) -> Batch:
    """The batch with each row's padding moved from its end to its front."""
    length = batch.tokens.shape[1]
    used = (np.asarray(batch.segment_ids) > 0).sum(axis=1)
    source = np.arange(length) - (length - used[:, None])  # negative: padding, which stands at the end
    named = batch.as_dict()
    moved = {
        name: np.take_along_axis(named[name], source % length, axis=1)
        for name in ("tokens", "positions", "segment_ids", "loss_weights", "feature_index")
        if name in named
    }
    return dataclasses.replace(batch, **moved)
