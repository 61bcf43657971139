"""What the benchmarks share: two programs measured in turns, and tables that docs/performance.md can take."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

PAUSE = 0.5  # seconds before each turn: PyTorch's threads spin for a while after theirs


def cpu_parser(doc: str, rounds: int, turn: str = "turns of each") -> argparse.ArgumentParser:
    """With the options that all comparisons on a CPU have: `cores` and `rounds`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both may use (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"{turn} (default: %(default)s)")
    return parser


def only_cores(count: int) -> None:
    """For this process and those it starts, and JAX on the CPU. Before JAX and PyTorch start: they count cores then."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ["JAX_PLATFORMS"] = "cpu"


def rested(run: Callable, *arguments, pause: float = PAUSE):
    """What `run` gives, after a pause."""
    time.sleep(pause)
    return run(*arguments)


def seconds(run: Callable, *arguments, pause: float = PAUSE) -> float:
    """Of one call, after a pause. `run` has to wait for its result itself."""
    time.sleep(pause)
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def in_turns(first: Callable, second: Callable, rounds: int, pause: float = PAUSE) -> tuple[list[float], list[float]]:
    """Seconds of each call, A B A B: what slows the machine down for a while slows both."""
    turns = [(seconds(first, pause=pause), seconds(second, pause=pause)) for _ in range(rounds)]
    ours, theirs = zip(*turns, strict=True)
    return list(ours), list(theirs)


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """Median, and from the lowest to the highest."""
    median, low, high = (f"{f(numbers):,.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({low}-{high})"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: one line a row, between bars.

    Raises ValueError: a row with more or fewer cells than there are columns.
    """
    lines = [tuple(columns), ("---",) * len(columns), *map(tuple, rows)]
    for line in lines:
        if len(line) != len(columns):
            raise ValueError(f"found {len(line)} cells, expected {len(columns)}: {line}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
