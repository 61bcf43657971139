"""What a person sees while training: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """Shows step, loss, tokens per second and time left. Use as a context manager; call `update` with metric lines."""

    def __init__(self, start: int, steps: int, console: Console | None = None):
        self._console = console or Console()
        self._steps = steps
        self._bar: Progress | None = None
        self._first: tuple[float, int] | None = None
        self._last_line = 0.0
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=start, told="compiling")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, line: dict[str, float]) -> None:
        """Tells of one line of metrics."""
        step, now = int(line["step"]), time.monotonic()
        told = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, told=told)
            return
        # The first line comes after compiling, which says nothing of the speed of what follows.
        first = self._first is None
        began, at = self._first = self._first or (now, step)
        if first or step == self._steps or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = "" if first else f"  {duration((now - began) / (step - at) * (self._steps - step))} left"
            self._console.print(f"step {step}/{self._steps}  {told}{left}", highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """h:mm:ss"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
