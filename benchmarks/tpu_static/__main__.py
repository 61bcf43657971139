"""Our TPU kernels beside the public ones on TPUs that are not here: compiled for each chip, their bundles counted.

    python -m benchmarks.tpu_static --results static.jsonl                 # everything: one to two hours on 2 cores
    python -m benchmarks.tpu_static --results static.jsonl --chips v5e tpu7x --cases '^(qwen3|siglip).*forward'

What is in the file of results already is not measured again, unless kernels, counting or versions have changed: the
same command goes on where it was stopped, and compiles ours alone after a change of ours. It ends with tables in
Markdown: ours with the ratio to the best public one, those, and what bounds ours:

    | ours, ms (of the best public one's) | aim | v5e | tpu7x |
    |---|---|---|---|
    | qwen3-4k forward | 1.00 | 0.904 (0.81) | 0.304 (0.68) |

Needs libtpu (the `tpu` extra). tokamax's kernels, which are the best public ones, take part where `import tokamax`
works: in a folder of its own, as it wants other versions of what we have,

    pip install --no-deps --target FOLDER tokamax==0.0.12 qwix einshape typeguard==2.13.3 tqdm
    PYTHONPATH=FOLDER python -m benchmarks.tpu_static ...

What the figures are worth is said in `kernels.static_estimate.estimate`: too low by 5 to 30 %, good for comparing
kernels on one chip. They are one TensorCore's, for the Pallas kernels alone; attention's "gradient" is the forward with
residuals and the backward. Decoding has no peer here, as JAX's paged kernels wait for copies that they start
themselves, which no schedule shows: its ratio is to the time that reading the cache takes.
"""

import argparse
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from benchmarks.tpu_static.cases import CASES, Case
from benchmarks.tpu_static.measure import Candidate, Measured, measure
from benchmarks.tpu_static.results import Compared, Key, Results, compared, state, tables
from kernels.static_estimate import CHIPS, chip_process


class Chip:
    """A chip's process; a new one when the compiler has brought it down."""

    def __init__(self, name: str, limit: int):
        self.name = name
        self._limit = limit
        self._process: ProcessPoolExecutor | None = None

    def measure(self, candidate: Candidate) -> Measured | str:
        """What was measured, or why it could not be. Raises BrokenProcessPool: the compiler died, who knows of what."""
        if self._process is None:
            self._process = chip_process(self.name)
        start = time.monotonic()
        try:
            return self._process.submit(measure, candidate, self.name, self._limit).result()
        except BrokenProcessPool:
            self.close()
            if time.monotonic() - start < self._limit:
                raise
            return f"took more than {self._limit} s"
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown()
        self._process = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), metavar="CHIP", help=", ".join(CHIPS))
    for name, what in (("cases", "cases"), ("kernels", "kernels")):
        pattern = dict(type=re.compile, default=re.compile(""), metavar="REGEX")
        parser.add_argument(f"--{name}", **pattern, help=f"only {what} whose names hold this")
    parser.add_argument("--results", type=Path, metavar="FILE", help="read and continued; without it, nothing is kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="chips at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=900, help="seconds for one program (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after so many")
    options = parser.parse_args()
    cases = [case for case in CASES if options.cases.search(case.name)]
    if not cases:
        parser.error(f"no case matches {options.cases.pattern!r}; there are: {', '.join(case.name for case in CASES)}")
    for reason in sorted({one.missing() for case in cases for one in case.public if one.missing()}):
        print(f"not compared with: {reason}: see --help\n", flush=True)

    results, deadline = Results(options.results), time.monotonic() + 60 * options.minutes

    def work(name: str) -> dict[tuple[str, str], Compared]:
        chip, found = Chip(name, options.limit), {}
        for case in cases:
            wanted = [one for one in (case.ours, *case.public) if options.kernels.search(one.name)]
            found[case.name, name] = compared(case, dict(_all(chip, case, wanted, results, deadline)))
        chip.close()
        return found

    with ThreadPoolExecutor(options.jobs) as threads:
        found = {key: cell for cells in threads.map(work, options.chips) for key, cell in cells.items()}
    print(tables(cases, options.chips, found))


def _all(
    chip: Chip, case: Case, wanted: list[Candidate], results: Results, deadline: float
) -> Iterator[tuple[str, Measured | str]]:
    """Each candidate's name and figures, as far as they are known or can be found out before the deadline."""
    for candidate in wanted:
        if candidate.missing():
            continue
        key = Key(case.name, chip.name, candidate.name, state(candidate))
        found = results.get(key)
        if found is None:
            if time.monotonic() > deadline:
                continue
            try:
                found = chip.measure(candidate)
            except BrokenProcessPool:  # may be for lack of memory: to be tried again
                print(f"{chip.name} {case.name}, {candidate.name}: the compiler's process died", flush=True)
                continue
            results.add(key, found)
            print(f"{chip.name} {case.name}, {candidate.name}: {_line(found)}", flush=True)
        yield candidate.name, found


def _line(found: Measured | str) -> str:
    if isinstance(found, str):
        return found
    return f"{found.milliseconds:.3f} ms, compiled in {found.compile_seconds:.0f} s"


if __name__ == "__main__":
    main()
