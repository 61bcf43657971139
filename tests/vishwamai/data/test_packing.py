"""First fit against a plain reference, and what a collated row holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vishwamai.data.packing import Capacity, Example, ImageLayout, collate, first_fit

LAYOUT = ImageLayout(rows=2, columns=4, patch_features=12)


def plain_first_fit(lengths, capacity):
    left, row_of = [], []
    for tokens, patches in lengths:
        room = [row for row, (t, p) in enumerate(left) if tokens <= t and patches <= p]
        if not room:
            left.append((capacity.tokens, capacity.patches))
        row_of.append(room[0] if room else len(left) - 1)
        t, p = left[row_of[-1]]
        left[row_of[-1]] = (t - tokens, p - patches)
    return row_of


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 24)), max_size=120))
def test_first_fit_equals_the_plain_loop(lengths):
    capacity = Capacity(40, 24, LAYOUT)
    row_of = first_fit(np.asarray(lengths).reshape(-1, 2), capacity)
    assert row_of.tolist() == plain_first_fit(lengths, capacity)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 24)), min_size=1, max_size=120))
def test_no_row_exceeds_either_capacity(lengths):
    row_of, lengths = first_fit(np.asarray(lengths), Capacity(40, 24, LAYOUT)), np.asarray(lengths)
    for row in range(row_of.max() + 1):
        assert (lengths[row_of == row].sum(axis=0) <= (40, 24)).all()


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="40 tokens"):
        first_fit(np.asarray([[41, 0]]), Capacity(40, 24, LAYOUT))


def example(tokens, images=0, per_image=LAYOUT.tokens, start=0, layout=LAYOUT):
    """`images` images first, then text; all is learned."""
    features = np.full(images * per_image + tokens, -1, np.int32)
    features[: images * per_image] = np.arange(images * per_image)
    pixels = tuple(np.full((layout.patches, 12), start + i + 1, np.uint8) for i in range(images))
    return Example(np.arange(len(features)) + 100 * start, np.ones(len(features), np.float32), features, pixels)


def test_a_row_of_two_examples_with_images():
    batch = collate([[example(3, 1), example(2, 2, start=1)], []], Capacity(40, 32, LAYOUT))
    lengths = [8 + 3, 16 + 2]
    assert batch.segment_ids[0].tolist() == [1] * lengths[0] + [2] * lengths[1] + [0] * (40 - sum(lengths))
    assert batch.positions[0, : sum(lengths)].tolist() == [*range(lengths[0]), *range(lengths[1])]
    assert batch.tokens[0, lengths[0]] == 100
    # Nothing stands before the first token of an example.
    assert batch.loss_weights[0, [0, lengths[0]]].tolist() == [0, 0]
    assert batch.loss_weights[0].sum() == sum(lengths) - 2
    # Each example's own features, moved behind those of the examples before.
    index = batch.feature_index[0]
    assert index[:11].tolist() == [*range(8), -1, -1, -1]
    assert index[11:29].tolist() == [*range(8, 24), -1, -1]
    assert (index[29:] == -1).all()
    assert batch.patch_segment_ids[0].tolist() == [1] * 8 + [2] * 8 + [3] * 8 + [0] * 8
    assert batch.patches[0, ::8, 0].tolist() == [1, 2, 3, 0]
    assert batch.patch_positions[0, 8:16].tolist() == [[r, c] for r in range(2) for c in range(4)]
    assert batch.grid == (2, 4)
    for array in batch.as_dict().values():
        assert not (array[1] > 0).any()  # an empty row is all padding


def test_pooled_images_take_a_quarter_of_the_features():
    layout = ImageLayout(rows=2, columns=4, patch_features=12, patches_per_feature=4)
    assert layout.tokens == 2
    batch = collate([[example(1, 1, 2), example(1, 2, 2)]], Capacity(16, 24, layout))
    assert batch.feature_index[0, :9].tolist() == [0, 1, -1, 2, 3, 4, 5, -1, -1]


def test_text_only_batches_have_no_patches():
    batch = collate([[Example(np.arange(3), np.ones(3, np.float32))]], Capacity(5))
    assert batch.patches is None and batch.feature_index is None and batch.grid is None
    assert batch.tokens.tolist() == [[0, 1, 2, 0, 0]]


@pytest.mark.parametrize("examples", [[example(33)], [example(1, 2), example(1, 3)]])
def test_a_row_that_overflows_is_an_error(examples):
    with pytest.raises(ValueError, match="row 0 holds"):
        collate([examples], Capacity(32, 32, LAYOUT))
