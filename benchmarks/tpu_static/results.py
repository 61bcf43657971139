"""What was measured, kept in a file from run to run, and the tables that are made of it."""

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.side_by_side import markdown
from benchmarks.tpu_static.cases import Case
from benchmarks.tpu_static.measure import Candidate, Measured

COUNTING = (
    *(f"kernels.static_estimate.{name}" for name in ("bundles", "chips", "compiler", "estimate")),
    *(f"benchmarks.tpu_static.{name}" for name in ("measure", "shapes")),
)


class Key(NamedTuple):
    """One candidate of one case on one chip; `state` stands for all that the figure depends on."""

    case: str
    chip: str
    kernel: str
    state: str


def state(candidate: Candidate) -> str:
    """A hash of the candidate's settings, the sources of what it measures and counts, and the packages' versions."""
    versions = {name: importlib.metadata.version(name) for name in candidate.distributions}
    parts = [repr(candidate), json.dumps(versions, sort_keys=True)]
    for module in (*COUNTING, type(candidate).__module__, *candidate.modules):
        parts += [path.read_text() for path in sources(module)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def sources(module: str) -> list[Path]:
    """Its file; of a package, every Python file in it."""
    spec = importlib.util.find_spec(module)
    if spec.submodule_search_locations is None:
        return [Path(spec.origin)]
    return sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.py"))


class Results:
    """Measurements by key; with a path, those of earlier runs too: one JSON object a line, written as they come."""

    def __init__(self, path: Path | None):
        self._path, self._found = path, {}
        if path is not None and path.exists():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                try:
                    values = json.loads(line)
                    key = Key(*(values.pop(name) for name in Key._fields))
                    self._found[key] = values.get("failed") or Measured(**values)
                except (ValueError, KeyError, TypeError) as error:
                    raise SystemExit(f"{path}, line {number}, is no measurement ({error!r}): delete it") from None

    def get(self, key: Key) -> Measured | str | None:
        """What was measured, or why it could not be; None if nobody tried."""
        return self._found.get(key)

    def add(self, key: Key, found: Measured | str) -> None:
        self._found[key] = found
        if self._path is not None:
            values = {"failed": found} if isinstance(found, str) else found._asdict()
            with self._path.open("a") as lines:
                lines.write(json.dumps(key._asdict() | values) + "\n")


class Compared(NamedTuple):
    """A case on a chip: ours, and the name and the figures of the fastest public candidate; None is not known."""

    ours: Measured | None
    name: str | None
    public: Measured | None


def compared(case: Case, found: dict[str, Measured | str]) -> Compared:
    """From what each candidate's name gave."""
    done = {name: one for name, one in found.items() if isinstance(one, Measured)}
    ours = done.pop(case.ours.name, None)
    best = min(done, key=lambda name: done[name].milliseconds, default=None)
    return Compared(ours, best, done.get(best))


def tables(cases: Iterable[Case], chips: Iterable[str], found: dict[tuple[str, str], Compared]) -> str:
    """Markdown: ours with its ratio to the best public candidate; then those, and by what ours is bound."""
    cases, chips = tuple(cases), tuple(chips)

    def table(title: str, cell: Callable[[Compared], str], aims: bool = False) -> str:
        rows = []
        for case in cases:
            aim = (f"{case.aim:.2f}" if case.aim else "-",) if aims else ()
            rows.append((case.name, *aim, *(cell(found[case.name, chip]) for chip in chips)))
        return markdown((title, *(("aim",) if aims else ()), *chips), rows)

    ours = table("ours, ms (of the best public one's)", _ours, aims=True)
    bounds = table("bounds of ours, ms: matrix units, HBM; spills", _bounds)
    return "\n\n".join((ours, table("best public, ms", _public), bounds))


def _ours(cell: Compared) -> str:
    if cell.ours is None:
        return "-"
    found, memory = cell.ours.milliseconds, cell.ours.memory_milliseconds
    ratio = ""
    if cell.public:
        ratio = f" ({found / cell.public.milliseconds:.2f})" + (", by HBM" if memory == found else "")
    elif memory:
        ratio = f" ({found / memory:.2f} of HBM's)"
    return f"{found:.3f}{ratio}"


def _public(cell: Compared) -> str:
    return f"{cell.public.milliseconds:.3f} {cell.name}" if cell.public else "-"


def _bounds(cell: Compared) -> str:
    if cell.ours is None:
        return "-"
    memory = f"{cell.ours.memory_milliseconds:.3f}" if cell.ours.memory_milliseconds else "-"
    return f"{cell.ours.floor_milliseconds:.3f}, {memory}; {cell.ours.spills:,}"
