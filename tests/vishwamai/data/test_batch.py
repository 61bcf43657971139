"""Rows of one example each, padded on either side."""

import numpy as np
import pytest

from vishwamai.data.batch import text_batch


def test_whole_rows():
    batch = text_batch([[5, 6, 7]])
    assert batch.rows == 1 and list(batch.as_dict()) == ["tokens", "positions", "segment_ids", "loss_weights"]
    assert batch.positions.tolist() == [[0, 1, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 1]] and batch.loss_weights.tolist() == [[1, 1, 1]]
    assert {name: array.dtype for name, array in batch.as_dict().items()} == {
        "tokens": np.int32,
        "positions": np.int32,
        "segment_ids": np.int32,
        "loss_weights": np.float32,
    }


def test_positions_start_at_the_first_token_that_is_there():
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 2, 0], [0, 0, 0, 0, 0]]
    batch = text_batch(np.zeros((4, 5)), mask)
    assert batch.positions[0].tolist() == [0, 0, 0, 1, 2]
    assert batch.positions[1, :3].tolist() == [0, 1, 2]
    assert batch.positions[2, [1, 3]].tolist() == [0, 2]
    there = np.asarray(mask) != 0
    assert (batch.segment_ids == there).all() and (batch.loss_weights == there).all()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape B T, found \(3,\)"):
        text_batch([1, 2, 3])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 2\), token ids have \(1, 3\)"):
        text_batch([[1, 2, 3]], [[1, 1]])
