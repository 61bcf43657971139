"""Which stream a row comes from."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vishwamai.data.mixture import MixedBatches, assign, rows_of
from vishwamai.data.packing import Capacity, Example

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(1, 300))
def test_every_stream_has_its_share_and_its_rows_in_order(weights, count):
    found = [assign(weights, row) for row in range(count)]
    for stream, weight in enumerate(weights):
        mine = [own for which, own in found if which == stream]
        assert mine == list(range(len(mine)))
        assert abs(len(mine) - count * weight / sum(weights)) < len(weights)
    for rows in (0, 1, count // 2, count):
        dealt = Counter(which for which, _ in found[:rows])
        assert rows_of(weights, rows) == [dealt[stream] for stream in range(len(weights))]


def test_far_rows_are_found_at_once():
    far = 10**15
    stream, own = assign([1, 2], far)
    assert own == pytest.approx(far * [1, 2][stream] / 3, abs=2)


def test_the_share_is_exact_over_a_period():
    assert Counter(assign([1, 3, 2], row)[0] for row in range(600)) == {0: 100, 1: 300, 2: 200}


@dataclass(frozen=True)
class Numbered:
    """Row i of stream `start` is one example that says start + i."""

    start: int

    def row(self, index):
        return [Example(np.asarray([self.start + index]), np.ones(1, np.float32))]


def test_weights_are_taken_as_they_were_written():
    """However small: 0.1 is a tenth exactly, and 1e-9 is not nothing."""
    streams = (Numbered(0), Numbered(10**6))
    for weights in [(1e-9, 3e-9), (0.1, 0.3)]:
        source = MixedBatches(streams, weights, Capacity(1), batch_size=1)
        said = [int(source.row(row)[0].tokens[0]) for row in range(4000)]
        assert sum(number < 10**6 for number in said) == 1000


def test_batches_are_consecutive_rows():
    source = MixedBatches((Numbered(0), Numbered(1000)), (0.25, 0.75), Capacity(1), batch_size=8)
    said = np.concatenate([source.batch(step).tokens[:, 0] for step in range(3)])
    assert sorted(said) == [*range(6), *range(1000, 1018)]
    assert [source.row(i)[0].tokens[0] for i in range(24)] == said.tolist()
