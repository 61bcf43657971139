"""Cycles of a kernel, from its bundles and from how often each part of them runs."""

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from kernels.static_estimate.bundles import Part
from kernels.static_estimate.chips import CHIPS
from kernels.static_estimate.compiler import Kernel


@dataclass(frozen=True)
class Geometry:
    """How often the parts of one kernel run.

    Args:
        bodies: runs of each part that multiplies, in program order; a kernel with a single one runs it for all of them.
        rows: runs of each conditional part that does not (what starts and ends a row of blocks), or one number for all.
        steps: steps of the grid; None takes the grid's own size, which must then be static.
        trips: passes of each loop inside a step, in program order.
        hbm_bytes: read from and written to HBM; 0 leaves the memory bound out.
    """

    bodies: tuple[int, ...]
    rows: int | tuple[int, ...] = 0
    steps: int | None = None
    trips: tuple[float, ...] = ()
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
    """What a step of the grid consists of: bundles that always run, parts that multiply, other conditional parts."""

    bundles: int
    bodies: tuple[Part, ...]
    rows: tuple[Part, ...]


def grid_step(kernel: Part) -> Step:
    """Finds the loop over the grid (the largest; without one the kernel is a single step) and takes it apart.

    The pipeline puts the step's own work behind one branch, so that the first and last passes only copy: it is the
    branch that holds every product of the loop, and counts as always taken.
    """
    loop = max((part for part in _outermost_loops(kernel)), key=lambda part: part.all_bundles, default=kernel)
    branches = [part for part in loop.parts if part.kind == "branch"]
    guard = next((part for part in branches if part.all_matmuls == loop.all_matmuls), None)
    always = [loop] if guard is None or not loop.all_matmuls else [loop, guard]
    conditional = [inner for part in always for inner in part.parts if inner.kind == "branch" and inner is not guard]
    inner_loops = [inner for part in always for inner in part.parts if inner.kind == "loop"]
    bodies, rows, bundles = [], [], 0
    for part in always:
        own = replace(part, parts=[inner for inner in part.parts if inner in inner_loops])
        if own.all_matmuls:
            bodies.append(own)
        else:
            bundles += part.bundles
    for part in conditional:
        (bodies if part.all_matmuls else rows).append(part)
    return Step(bundles, tuple(bodies), tuple(rows))


def _outermost_loops(part: Part):
    for inner in part.parts:
        if inner.kind == "loop":
            yield inner
        else:
            yield from _outermost_loops(inner)


def estimate(kernel: Kernel, geometry: Geometry, chip: str) -> Estimate:
    """cycles = steps · bundles of every step + Σ runs · max(bundles, matrix-unit floor) + rows · bundles of a row.

    Not counted: waiting for DMA, conflicts of VMEM banks, XLA's own operations around the kernel. Trust differences
    above a tenth between forms of one kernel on one chip, and nothing for steps shorter than a microsecond.

    Raises ValueError: the geometry does not describe this kernel (its steps, bodies or inner loops).
    """
    core, step = CHIPS[chip], grid_step(kernel.bundles)
    steps = geometry.steps
    if steps is None:
        if kernel.grid is None or None in kernel.grid:
            raise ValueError(f"{kernel.name}'s grid is {kernel.grid}: the geometry must give its steps")
        steps = prod(kernel.grid)
    runs = geometry.bodies if len(step.bodies) != 1 else (sum(geometry.bodies),)
    if len(runs) != len(step.bodies):
        found = f"{len(step.bodies)} parts ({', '.join(str(body.all_bundles) for body in step.bodies)} bundles)"
        raise ValueError(f"{kernel.name} multiplies in {found}, the geometry gives runs of {len(runs)}: {runs}")
    rows = (geometry.rows,) * len(step.rows) if isinstance(geometry.rows, int) else geometry.rows
    if len(rows) != len(step.rows):
        found = f"{len(step.rows)} other parts ({', '.join(str(row.all_bundles) for row in step.rows)} bundles)"
        raise ValueError(f"{kernel.name} has {found}, the geometry gives rows of {len(rows)}: {rows}")
    loops = [part for top in (*step.bodies, *step.rows) for part in top.walk() if part.kind == "loop"]
    loops = sorted((loop for loop in loops if loop not in step.bodies), key=lambda loop: loop.start)
    if len(loops) != len(geometry.trips):
        found = f"{len(loops)} loops inside a step ({', '.join(str(loop.all_bundles) for loop in loops)} bundles)"
        raise ValueError(f"{kernel.name} has {found}, the geometry gives trips of {len(geometry.trips)}")
    trips = {loop.start: passes for loop, passes in zip(loops, geometry.trips, strict=True)}

    def cycles(part: Part) -> float:
        inner = sum(cycles(inner) * trips.get(inner.start, 1) for inner in part.parts)
        return max(part.bundles, core.matmul_floor(part.matmuls)) + inner

    def floor(part: Part) -> float:
        return core.matmul_floor(part.matmuls) + sum(floor(inner) * trips.get(inner.start, 1) for inner in part.parts)

    total = steps * step.bundles
    total += sum(count * cycles(part) for count, part in zip(rows, step.rows, strict=True))
    total += sum(count * cycles(body) for count, body in zip(runs, step.bodies, strict=True))
    return Estimate(
        1e3 * total / core.clock,
        1e3 * sum(count * floor(body) for count, body in zip(runs, step.bodies, strict=True)) / core.clock,
        1e3 * geometry.hbm_bytes / core.bandwidth,
        kernel.bundles.all_operations["spill"],
    )
