"""One candidate on one chip: compiled, its kernels estimated, summed."""

import importlib
import signal
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from kernels.static_estimate import Geometry, Kernel, compile_program, estimate, target


class Candidate(Protocol):
    """One way to compute a case; made here, compiled in a chip's process, so that it must pickle."""

    name: str
    modules: tuple[str, ...]  # whose sources decide what it measures, beside the one that it is written in
    distributions: tuple[str, ...]  # whose versions do

    def missing(self) -> str | None:
        """Why it can't be compiled here; None where it can."""

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        """The function, and the shapes and types of its arguments."""

    def geometry(self, kernel: Kernel, number: int) -> Geometry | None:
        """How often the parts of this kernel of its program run, the `number`-th of that name, from 0; None leaves it
        out (it only keeps the books)."""


class Measured(NamedTuple):
    """Sums over the program's Pallas kernels; `by_kernel` holds each one's name and milliseconds."""

    milliseconds: float
    cycle_milliseconds: float
    floor_milliseconds: float
    memory_milliseconds: float
    spills: int
    temporary_bytes: int
    compile_seconds: float
    by_kernel: tuple[tuple[str, float], ...]


def without(package: str) -> str | None:
    """Why it can't be had here; None where it can."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} can't be imported ({error})"
    return None


def measure(candidate: Candidate, chip: str, seconds: int) -> Measured:
    """Runs in the process that `chip_process(chip)` gave; after so many seconds the system ends that process.

    Raises CompileError (too much VMEM, for instance), ValueError: a geometry that does not describe the kernels.
    """
    signal.alarm(seconds)  # nothing else reaches a compiler that does not come back
    try:
        return _measure(candidate, chip)
    finally:
        signal.alarm(0)


def _measure(candidate: Candidate, chip: str) -> Measured:
    program = compile_program(*candidate.program())
    names = [kernel.name for kernel in program.kernels]
    with target():
        described = [
            (kernel, candidate.geometry(kernel, names[:place].count(kernel.name)))
            for place, kernel in enumerate(program.kernels)
        ]
    kernels = [kernel for kernel, geometry in described if geometry is not None]
    estimates = [estimate(kernel, geometry, chip) for kernel, geometry in described if geometry is not None]
    if not kernels:
        raise ValueError(f"{candidate.name} compiled to no kernel that does the work: {names}")
    return Measured(
        sum(one.milliseconds for one in estimates),
        sum(one.cycle_milliseconds for one in estimates),
        sum(one.floor_milliseconds for one in estimates),
        sum(one.memory_milliseconds for one in estimates),
        sum(one.spills for one in estimates),
        program.temporary_bytes,
        program.seconds,
        tuple((kernel.name, one.milliseconds) for kernel, one in zip(kernels, estimates, strict=True)),
    )
