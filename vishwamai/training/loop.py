"""The loop: batch -> step -> metrics, one step behind so that the device never waits; checkpoints; a clean stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vishwamai.checkpoint import Checkpoints
from vishwamai.data.batch import Batch
from vishwamai.data.loader import BatchSource, loader
from vishwamai.experiment import Experiment
from vishwamai.models.config import TextConfig
from vishwamai.parallel.sharding import row_sharding
from vishwamai.training.diagnose import explain
from vishwamai.training.metrics import MetricsWriter, means
from vishwamai.training.progress import ProgressReport
from vishwamai.training.step import Trainer, TrainState
from vishwamai.training.throughput import flops_per_step, memory_gb, peak_flops


@dataclass
class StopRequest:
    """The signal that asked for a stop, once one has."""

    by: signal.Signals | None = None


@dataclass(frozen=True)
class _Taken:
    """A step that the device was given, and whose metrics have not been fetched."""

    step: int
    batch: Batch
    metrics: dict[str, Any]


def train(
    experiment: Experiment,
    trainer: Trainer,
    text_config: TextConfig,
    state: TrainState,
    source: BatchSource,
    checkpoints: Checkpoints,
) -> tuple[TrainState, signal.Signals | None]:
    """Trains from `state.step` to `training.steps`; saves every so often, at the end, and when told to stop.

    Returns the last state and the signal (SIGTERM, SIGINT) that ended training early, or None. Raises
    NonFiniteGradients with the batch saved, CheckpointError when the state can't be written.
    """
    run_dir, steps, start = Path(experiment.run_dir), experiment.training.steps, int(state.step)
    rows = row_sharding(trainer.mesh)
    with (
        MetricsWriter(run_dir, start, experiment.logging.tensorboard) as writer,
        ProgressReport(start, steps) as progress,
        _stop_on_signals() as stop,
    ):
        clock = _Clock(trainer, text_config)
        taken: _Taken | None = None

        def settle() -> None:
            """Fetches the metrics of the step taken last: stops if it was unhealthy, tells of it if a line is due."""
            if taken is None:
                return
            metrics = means(jax.device_get(taken.metrics))
            if not metrics.pop("healthy"):
                raise explain(trainer, state, jax.device_put(taken.batch, rows), run_dir)
            clock.count(taken.batch)
            if taken.step % experiment.logging.every == 0 or taken.step == steps:
                line = {"step": taken.step, "loss": metrics.pop("loss")} | clock.read(taken.batch) | metrics
                told = (taken.step - 1) // experiment.logging.every * experiment.logging.every  # the line before
                line |= {f"mixture/{name}": share for name, share in source.mixture(told, taken.step).items()}
                writer.write(line)
                progress.update(line)

        batches = loader(source, start, steps)
        for step in range(start + 1, steps + 1):
            with clock.waiting():
                batch = next(batches)
            state, metrics = trainer.step(state, jax.device_put(batch, rows))
            settle()  # of the step before, while the device works on this one
            taken = _Taken(step, batch, metrics)
            # Asked once: a signal that comes after this finds the next step.
            last = step == steps or stop.by is not None
            if last or step % experiment.checkpoint.every == 0:
                settle()  # only a state that is known to be healthy is saved
                taken = None
                checkpoints.save(step, state)
            checkpoints.check()
            if last:
                break
        checkpoints.wait()
    return state, stop.by


class _Clock:
    """Speed since it was read last."""

    def __init__(self, trainer: Trainer, text_config: TextConfig):
        self._trainer, self._text_config = trainer, text_config
        peak = peak_flops(trainer.mesh.devices.flat[0])
        self._peak = peak and peak * trainer.mesh.size
        self._reset()

    def _reset(self) -> None:
        self._began, self._steps, self._tokens, self._waited = time.perf_counter(), 0, 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is spent waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def count(self, batch: Batch) -> None:
        self._steps += 1
        self._tokens += int(np.count_nonzero(batch.segment_ids))

    def read(self, batch: Batch) -> dict[str, float]:
        """Means over the steps counted: seconds of one, tokens per second, share of waiting, memory, MFU if known."""
        elapsed = time.perf_counter() - self._began
        seconds = elapsed / self._steps
        speed = {
            "tokens_per_second": self._tokens / elapsed,
            "seconds": seconds,
            "data_wait": self._waited / elapsed,
            "memory_gb": memory_gb(),
        }
        if self._peak:
            speed["mfu"] = flops_per_step(self._trainer.abstract, self._text_config, batch) / seconds / self._peak
        self._reset()
        return speed


@contextmanager
def _stop_on_signals() -> Iterator[StopRequest]:
    """SIGTERM and SIGINT ask for a stop after the current step; a second one ends the process as usual."""
    stop = StopRequest()
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number, _frame):
        stop.by = signal.Signals(number)
        for number, handler in usual.items():
            signal.signal(number, handler)

    for number in usual:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
