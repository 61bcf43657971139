"""The loop: batch -> step -> metrics, one step behind so that the device never waits; checkpoints; a clean stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from vishwamai.training.metrics import MetricsWriter, scalars
from vishwamai.training.progress import ProgressReport
from vishwamai.training.step import Trainer, TrainState
from vishwamai.training.throughput import flops_per_step, memory_gb, peak_flops


@dataclass
class StopRequest:
    """The signal that asked for a stop, once one has."""

    by: signal.Signals | None = None


@dataclass
class _Clock:
    """Time, tokens and waiting since the last line of metrics."""

    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    waited: float = 0.0


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
    rows, peak = row_sharding(trainer.mesh), peak_flops(trainer.mesh.devices.flat[0])
    clock = _Clock()
    pending: tuple[int, dict[str, Any], Batch] | None = None

    def settle() -> None:
        """Fetches the pending step's metrics, stops if it was unhealthy, writes its line if one is due."""
        nonlocal pending, clock
        if pending is None:
            return
        (step, metrics, batch), pending = pending, None
        line = scalars(jax.device_get(metrics))
        if not line.pop("healthy"):
            bad = source.batch(int(state.step))
            raise explain(trainer, state, jax.device_put(bad, rows), run_dir)
        clock.steps += 1
        clock.tokens += int(np.count_nonzero(batch.segment_ids))
        if step % experiment.logging.every and step != steps:
            return
        seconds = (time.perf_counter() - clock.began) / clock.steps
        speed = {"tokens_per_second": clock.tokens / clock.steps / seconds, "seconds": seconds}
        line = {"step": step, "loss": line.pop("loss")} | speed | line
        line |= {"data_wait": clock.waited / clock.steps / seconds, "memory_gb": memory_gb()}
        if peak:
            flops = flops_per_step(trainer.abstract, text_config, batch)
            line["mfu"] = flops / seconds / (peak * trainer.mesh.size)
        writer.write(line)
        progress.update(line)
        clock = _Clock()

    with (
        MetricsWriter(run_dir, start, experiment.logging.tensorboard) as writer,
        ProgressReport(start, steps) as progress,
        _stop_on_signals() as stop,
    ):
        batches = loader(source, start, steps)
        for step in range(start + 1, steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            clock.waited += time.perf_counter() - asked
            state, metrics = trainer.step(state, jax.device_put(batch, rows))
            settle()
            pending = (step, metrics, batch)
            if step == steps or stop.by or step % experiment.checkpoint.every == 0:
                settle()  # only a state that is known to be healthy is saved
                checkpoints.save(step, state)
            checkpoints.check()
            if stop.by:
                break
        checkpoints.wait()
    return state, stop.by


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
