"""Order, resuming and errors of the prefetching loader."""

import threading
import time

import numpy as np
import pytest

from vishwamai.data.batch import text_batch
from vishwamai.data.loader import loader


class Steps:
    """The batch of a step says its number; later ones are ready sooner."""

    def __init__(self, broken=None):
        self.broken, self.threads = broken, set()

    def batch(self, step):
        self.threads.add(threading.current_thread())
        if step == self.broken:
            raise ValueError(f"step {step}: no image file page.png")
        time.sleep(0.004 * (3 - step % 4))
        return text_batch(np.full((2, 3), step))


def steps_of(batches):
    return [int(batch.tokens[0, 0]) for batch in batches]


def test_batches_come_in_order_and_resume_anywhere():
    source = Steps()
    assert steps_of(loader(source, 0, 12, threads=3)) == list(range(12))
    assert steps_of(loader(source, 7, 12)) == list(range(7, 12))
    assert threading.main_thread() not in source.threads


def test_no_steps_left():
    assert steps_of(loader(Steps(), 5, 5)) == []


@pytest.mark.timeout(20)
def test_an_error_surfaces_with_its_message_when_its_turn_comes():
    batches = loader(Steps(broken=3), 0, 100)
    seen = []
    with pytest.raises(ValueError, match="step 3: no image file page.png"):
        for batch in batches:
            seen += steps_of([batch])
    assert seen == [0, 1, 2]
