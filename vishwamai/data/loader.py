"""Batches by step number, prefetched in order."""

from collections.abc import Iterator
from typing import Protocol

import grain
from absl import flags

from vishwamai.data.batch import Batch

# Otherwise Grain writes a note on its own tracebacks into the message of every error that a source raises.
flags.FLAGS.set_default("grain_py_traceback_filtering", "off")


class BatchSource(Protocol):
    """The global batch of every step, a pure function of its number: a run resumes anywhere at once."""

    def batch(self, step: int) -> Batch:
        """The batch of step 0, 1, 2, ... as numpy arrays."""
        ...

    def mixture(self, start: int, stop: int) -> dict[str, float]:
        """The share of each dataset in the tokens of steps [start, stop); empty where it is not known."""
        ...


def loader(source: BatchSource, start: int, stop: int, *, threads: int = 2, prefetch: int = 4) -> Iterator[Batch]:
    """The batches of steps [start, stop) in order, made ahead of time by threads.

    What a batch raises is raised by `next` when its turn comes.
    """
    batches = grain.MapDataset.range(start, stop).map(source.batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))
