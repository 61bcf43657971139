"""metrics.jsonl and TensorBoard: each step stands there once, however often the run was stopped."""

import json
from pathlib import Path
from typing import Any, Self

from tensorboardX import SummaryWriter

from vishwamai.training.run import write_text

FILE = "metrics.jsonl"


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """Means of fetched metrics: a (sum, count) pair is divided, a number stands for itself."""
    return {
        name: float(value[0]) / float(value[1]) if isinstance(value, tuple) else float(value)
        for name, value in metrics.items()
    }


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
        cut_back(run_dir / FILE, start)
        self._file = (run_dir / FILE).open("a", encoding="utf-8")
        # purge_step hides what an interrupted run wrote beyond the step that it resumes from.
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def write(self, line: dict[str, float]) -> None:
        """One object per line; NaN and infinity as null, which JSON has no numbers for."""
        finite = {name: value if abs(value) < float("inf") else None for name, value in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(line["step"]))
