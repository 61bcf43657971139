"""Our TPU kernels beside the public ones on TPUs that are not here: compiled for each chip, their bundles counted.

    python -m benchmarks.tpu_static                                        # everything: hours on 2 cores
    python -m benchmarks.tpu_static --chips tpu7x --cases 'qwen3.*forward' --json qwen3.json

Needs libtpu (the `tpu` extra). tokamax's kernels take part where `import tokamax` works; it may lie in a folder of its
own (`pip install --no-deps --target FOLDER tokamax qwix einshape`, then PYTHONPATH=FOLDER). What the figures are worth
is said in `kernels.static_estimate.estimate`: too low by 5 to 30 %, good for comparing kernels on one chip. They are
one TensorCore's, for the Pallas kernels alone; a "gradient" is the forward with residuals and the backward.
"""

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.tpu_static.cases import CASES, Case
from benchmarks.tpu_static.measure import Candidate, Measured, measure
from kernels.static_estimate import CHIPS, chip_process

console = Console()


class Chip:
    """A chip's process; a new one when the compiler has brought it down."""

    def __init__(self, name: str):
        self.name = name
        self._process: ProcessPoolExecutor | None = None

    def measure(self, candidate: Candidate) -> Measured | str:
        """What was measured, or why it could not be."""
        if reason := candidate.missing():
            return reason
        if self._process is None:
            self._process = chip_process(self.name)
        try:
            return self._process.submit(measure, candidate, self.name).result()
        except BrokenProcessPool:
            self.close()
            return "the compiler's process died"
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown()
        self._process = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), metavar="CHIP", help=", ".join(CHIPS))
    parser.add_argument(
        "--cases", type=re.compile, default=re.compile(""), metavar="REGEX", help="only cases like this"
    )
    parser.add_argument("--kernels", type=re.compile, default=re.compile(""), metavar="REGEX", help="only such kernels")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every measurement, one a line")
    options = parser.parse_args()
    cases = [case for case in CASES if options.cases.search(case.name)]
    if not cases:
        parser.error(f"no case matches {options.cases.pattern!r}; there are: {', '.join(case.name for case in CASES)}")
    title = "Static estimate of one TensorCore's time in Pallas kernels"
    table = Table(title=title, title_style="", box=SIMPLE_HEAD)
    columns = ("best public, ms", "ours, ms", "ratio", "MXU floor, ms", "HBM, ms", "spills", "compiled in, s")
    for name in ("case", "chip", "best public", *columns):
        table.add_column(name, justify="right" if name in columns else "left")
    for chip in map(Chip, options.chips):
        for case in cases:
            results = {}
            for candidate in (*case.public, case.ours):
                if not options.kernels.search(candidate.name):
                    continue
                results[candidate.name] = found = chip.measure(candidate)
                if isinstance(found, str):
                    console.print(f"{case.name}, {chip.name}, {candidate.name}: {found}", markup=False, highlight=False)
                if options.json:
                    _write(options.json, case.name, chip.name, candidate.name, found)
            table.add_row(case.name, chip.name, *row(case, results))
        chip.close()
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(width, len(title))).print(table)


def row(case: Case, results: dict[str, Measured | str]) -> tuple[str, ...]:
    """The table's cells behind case and chip; floor, HBM and the rest are ours, where there is ours."""
    done = {name: found for name, found in results.items() if isinstance(found, Measured)}
    ours = done.pop(case.ours.name, None)
    best = min(done, key=lambda name: done[name].milliseconds, default=None)
    shown = ours or (done[best] if best else None)
    if shown is None:
        return ("-",) * 8
    return (
        best or "-",
        f"{done[best].milliseconds:.3f}" if best else "-",
        f"{ours.milliseconds:.3f}" if ours else "-",
        f"{ours.milliseconds / done[best].milliseconds:.2f}" if ours and best else "-",
        f"{shown.floor_milliseconds:.3f}",
        f"{shown.memory_milliseconds:.3f}",
        f"{shown.spills:,}",
        f"{shown.compile_seconds:.0f}",
    )


def _write(path: Path, case: str, chip: str, kernel: str, found: Measured | str) -> None:
    values = {"failed": found} if isinstance(found, str) else found._asdict()
    with path.open("a") as lines:
        lines.write(json.dumps({"case": case, "chip": chip, "kernel": kernel, **values}) + "\n")


if __name__ == "__main__":
    main()
