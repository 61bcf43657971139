"""Cycles of a kernel, from its bundles and from how often each part of them runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from kernels.static_estimate.bundles import Part
from kernels.static_estimate.chips import CHIPS
from kernels.static_estimate.compiler import Kernel


@dataclass(frozen=True)
class Geometry:
    """How often the parts of one kernel run.

    What always runs does so at each step. Numbers stand in program order; where the compiler made one part of what was
    written as several, it runs as often as they do together.

    Args:
        bodies: runs of each conditional part that multiplies (a block that needs no mask, one that does); where the
            compiler found that it always runs, they must sum to the steps.
        rows: runs of each other conditional part (what starts and ends a row of blocks); the last number stands for all
            that follow, as the compiler may add some that write back.
        steps: steps of the grid; None takes the grid's own size, which must then be static.
        trips: passes of each loop inside a step.
        shares: for each conditional part that multiplies inside a loop or a body, in how many of the passes through
            that it runs (0 to 1); none given: in all. One that only holds others which multiply has no share: the
            compiler asks first whether any of them runs.
        hbm_bytes: read from and written to HBM; 0 leaves the memory bound out.
    """

    bodies: tuple[int, ...] = ()
    rows: tuple[int, ...] = (0,)
    steps: int | None = None
    trips: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    hbm_bytes: int = 0


class Estimate(NamedTuple):
    """Cycles by the clock, the part of them that the matrix units need at least, and bytes by the bandwidth."""

    cycle_milliseconds: float
    floor_milliseconds: float
    memory_milliseconds: float
    spills: int

    @property
    def milliseconds(self) -> float:
        return max(self.cycle_milliseconds, self.memory_milliseconds)


class Step(NamedTuple):
    """A step of the grid: the pipeline's bundles, what always runs, what runs on some steps and multiplies, or doesn't.

    The parts of `always` are its loops; `bodies` and `rows` stand in program order.
    """

    pipeline: int
    always: Part
    bodies: tuple[Part, ...]
    rows: tuple[Part, ...]


def grid_step(kernel: Part) -> Step:
    """Finds the loop over the grid (the largest; without one the kernel is a single step) and takes it apart.

    The pipeline puts the step's own work behind one branch, so that the first passes only fetch: it is the branch that
    holds every product of the loop, and counts as always taken, like the branches beside it, which fetch.
    """
    loop = max(_outermost_loops(kernel), key=lambda part: part.all_bundles, default=kernel)
    branches = [part for part in loop.parts if part.kind == "branch"]
    work = next((part for part in branches if part.all_matmuls and part.all_matmuls == loop.all_matmuls), loop)
    pipeline = 0 if work is loop else loop.all_bundles - work.all_bundles
    conditional = [part for part in work.parts if part.kind == "branch"]
    return Step(
        pipeline,
        replace(work, parts=[part for part in work.parts if part.kind == "loop"]),
        tuple(part for part in conditional if part.all_matmuls),
        tuple(part for part in conditional if not part.all_matmuls),
    )


def _outermost_loops(part: Part) -> Iterator[Part]:
    for inner in part.parts:
        if inner.kind == "loop":
            yield inner
        else:
            yield from _outermost_loops(inner)


def estimate(kernel: Kernel, geometry: Geometry, chip: str) -> Estimate:
    """cycles = steps · bundles of every step + Σ runs · max(bundles, matrix-unit floor) + rows · bundles of a row.

    Branches inside a body count as the geometry's shares say, or as taken. Not counted: waiting for DMA, conflicts of
    VMEM banks, XLA's own operations around the kernel. Trust differences above a tenth between forms of one kernel on
    one chip, and nothing for steps shorter than a microsecond.

    Raises ValueError: the geometry does not describe this kernel (its steps, bodies, inner loops or inner branches).
    """
    core, step = CHIPS[chip], grid_step(kernel.bundles)
    steps = geometry.steps
    if steps is None:
        if kernel.grid is None or None in kernel.grid:
            raise ValueError(f"{kernel.name}'s grid is {kernel.grid}: the geometry must give its steps")
        steps = prod(kernel.grid)
    unconditional = not step.bodies and step.always.all_matmuls and sum(geometry.bodies) == steps
    runs = () if unconditional else _for_each("parts that multiply", step.bodies, geometry.bodies, kernel.name)
    further = len(step.rows) - len(geometry.rows)
    rows = geometry.rows + geometry.rows[-1:] * further if step.rows else ()
    rows = _for_each("other conditional parts", step.rows, rows, kernel.name)
    tops = step.always, *step.bodies, *step.rows
    inside = sorted((part for top in tops for part in top.walk() if part is not top), key=_start)
    loops = [part for part in inside if part.kind == "loop"]
    passes = _for_each("loops inside a step", loops, geometry.trips, kernel.name)
    branches = [part for part in inside if part.kind == "branch" and _multiplies(part)] if geometry.shares else []
    shares = _for_each("conditional parts that multiply inside others", branches, geometry.shares, kernel.name)
    runs_of = {id(part): count for part, count in zip((*loops, *branches), (*passes, *shares), strict=True)}

    def cycles(part: Part) -> float:
        inner = sum(cycles(inner) * runs_of.get(id(inner), 1) for inner in part.parts)
        return max(part.bundles, core.matmul_floor(part.matmuls)) + inner

    def floor(part: Part) -> float:
        inner = sum(floor(inner) * runs_of.get(id(inner), 1) for inner in part.parts)
        return core.matmul_floor(part.matmuls) + inner

    parts = list(zip((steps, *runs, *rows), (step.always, *step.bodies, *step.rows), strict=True))
    return Estimate(
        1e3 * (steps * step.pipeline + sum(count * cycles(part) for count, part in parts)) / core.clock,
        1e3 * sum(count * floor(part) for count, part in parts) / core.clock,
        1e3 * geometry.hbm_bytes / core.bandwidth,
        kernel.bundles.all_operations["spill"],
    )


def _start(part: Part) -> int:
    return part.start


def _multiplies(part: Part) -> bool:
    """Itself or in a loop of its own: not only in branches inside it."""
    return bool(part.matmuls) or any(inner.kind == "loop" and _multiplies(inner) for inner in part.parts)


def _for_each(what: str, parts: Sequence[Part], counts: tuple[float, ...], name: str) -> tuple[float, ...]:
    """One number for each of the parts; their sum where there is but one."""
    counts = (sum(counts),) if len(parts) == 1 and counts else counts
    if len(counts) != len(parts):
        found = f"{len(parts)} {what} ({', '.join(str(part.all_bundles) for part in parts)} bundles)"
        raise ValueError(f"{name} has {found}, the geometry gives {len(counts)} numbers for them: {counts}")
    return counts
