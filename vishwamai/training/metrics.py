"""metrics.jsonl and TensorBoard: each step stands there once, however often the run was stopped."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from vishwamai.training.run import write_text

FILE = "metrics.jsonl"
SECONDS_BETWEEN_FLUSHES = 10.0  # of the TensorBoard file: each waits for the disk


Line = dict[str, float | list]


def means(metrics: dict[str, Any]) -> Line:
    """Means of fetched metrics: a (sum, count) pair is divided, a number stands for itself, an array is a list."""
    divided = {name: np.divide(*value) if isinstance(value, tuple) else value for name, value in metrics.items()}
    return {name: np.asarray(value, np.float64).tolist() for name, value in divided.items()}


def _finite(value: float | list) -> float | list | None:
    if isinstance(value, list):
        return [_finite(round(item, 6) if isinstance(item, float) else item) for item in value]
    return value if abs(value) < float("inf") else None


def cut_back(path: Path, step: int) -> None:
    """Drops the lines after `step` (and one cut off by a crash): the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))


class MetricsWriter:
    """Appends lines to metrics.jsonl, and scalars to TensorBoard files beside it. Use as a context manager."""

    def __init__(self, run_dir: Path, start: int, tensorboard: bool):
        self._run_dir = run_dir
        cut_back(run_dir / FILE, start)
        self._file = (run_dir / FILE).open("a", encoding="utf-8")
        self._board = _Board(run_dir / "tensorboard", start) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        for file in (self._file, self._board):
            if file:
                with contextlib.suppress(OSError):  # every line has been flushed by `write`, or it has raised
                    file.close()

    def write(self, line: Line) -> None:
        """One object per line; NaN and infinity as null, which JSON has no numbers for. Raises OSError.

        A list (the load of every expert) stands in the file only, to six digits.
        """
        finite = {name: _finite(value) for name, value in line.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
            if self._board:
                self._board.write(line)
        except OSError as error:
            why = f"metrics can't be written ({error.strerror}): make room, then the same command resumes"
            raise OSError(error.errno, why, str(self._run_dir)) from error


class _Board:
    """TensorBoard's event file.

    tensorboardX's own SummaryWriter writes in a thread; once a full disk has ended that thread, the next calls wait
    for ever.
    """

    def __init__(self, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        # Hides what an interrupted run wrote beyond the step that it resumes from.
        self._events.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = 0.0

    def write(self, line: Line) -> None:
        numbers = {name: value for name, value in line.items() if name != "step" and not isinstance(value, list)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._events.write_event(Event(wall_time=time.time(), step=int(line["step"]), summary=Summary(value=values)))
        if time.monotonic() - self._flushed >= SECONDS_BETWEEN_FLUSHES:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()
