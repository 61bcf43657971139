"""What a text model is scored on, by name, and the scoring: text -> scores -> `results.json`."""

import difflib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from vishwamai.config import ConfigError
from vishwamai.data.documents import DocumentsConfig, open_documents
from vishwamai.evaluation.perplexity import perplexity
from vishwamai.evaluation.results import write_results
from vishwamai.experiment import Experiment
from vishwamai.pretrained import VishwamAI

BENCHMARKS = {"perplexity": perplexity}  # name -> (model, documents, batch_size=, on_progress=) -> dataclass of scores


def load_benchmarks(names: Sequence[str], data: Sequence[str], run: Experiment | None) -> dict[str, Sequence[str]]:
    """The documents of each named benchmark: where `data` says they lie, each `NAME=PATH`, else what `run` held out.

    Raises:
        ConfigError: an unknown name, a benchmark without text, or text that no named benchmark uses.
        DataError: as `open_documents`.
    """
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(BENCHMARKS)
            raise ConfigError(f"unknown benchmark {name!r}: {hint}A text model can be scored on: {known}")
    places = {}
    for entry in data:
        name, _, place = entry.partition("=")
        if name not in names or not place:
            raise ConfigError(f"--data {entry}: expected NAME=PATH, NAME being {' or '.join(names)}")
        if name in places:
            raise ConfigError(f"two texts for {name!r}: {places[name]} and {place}")
        places[name] = place
    held_out = run.data.held_out if run else []
    found = {}
    for name in names:
        if name in places:
            found[name] = open_documents([DocumentsConfig(path=places[name])], seed=0)
        elif held_out:
            found[name] = open_documents(held_out, run.seed)
        else:
            raise ConfigError(
                f"benchmark {name!r} needs held-out text: add --data {name}=PATH, or train with data.held_out"
            )
    return found


def evaluate(
    model: VishwamAI,
    benchmarks: Mapping[str, Sequence[str]],
    *,
    output: Path,
    limit: int | None = None,
    batch_size: int = 16,
    provenance: Mapping[str, object] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict:
    """Scores `model` on the first `limit` documents of every benchmark.

    Returns what `output/results.json` holds (`write_results`); scores are the fields of `Perplexity`. `on_progress`
    is called with (benchmark, done, in all). Raises as `perplexity`.
    """
    start = time.monotonic()
    scores = {}
    for name, documents in benchmarks.items():
        of = BENCHMARKS[name](
            model,
            list(itertools.islice(documents, limit)),
            batch_size=batch_size,
            on_progress=lambda done, total, name=name: on_progress(name, done, total),
        )
        scores[name] = asdict(of)
    return write_results(output, scores, start=start, limit=limit, provenance=provenance)
