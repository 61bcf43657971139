"""What a text model is scored on, by name, and the scoring: text -> scores -> `results.json`."""

import difflib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from vishwamai.config import ConfigError
from vishwamai.data.sources import DataError, JsonLines
from vishwamai.evaluation.perplexity import perplexity
from vishwamai.evaluation.results import write_results
from vishwamai.pretrained import VishwamAI

BENCHMARKS = {"perplexity": perplexity}  # name -> (model, documents, batch_size=, on_progress=) -> dataclass of scores


def load_benchmarks(names: Sequence[str], data: Sequence[str]) -> dict[str, list[str]]:
    """The documents of each named benchmark; `data` says where they lie, each `NAME=PATH`.

    Raises:
        ConfigError: an unknown name, a benchmark without text, or text that no named benchmark uses.
        DataError: as `read_documents`.
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
            raise ConfigError(f"--data {entry}: expected NAME=FILE_OR_DIR, NAME being {' or '.join(names)}")
        if name in places:
            raise ConfigError(f"two texts for {name!r}: {places[name]} and {place}")
        places[name] = place
    for name in names:
        if name not in places:
            raise ConfigError(f"benchmark {name!r} needs held-out text: add --data {name}=FILE_OR_DIR")
    return {name: read_documents(Path(places[name])) for name in names}


def read_documents(path: Path) -> list[str]:
    """The documents of a .txt file (one), a .jsonl file (the `text` of each line), or of all such in a folder, sorted.

    Raises DataError for a path that is neither, a folder without any, and what is no text.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".jsonl"))
        if not files:
            raise DataError(f"{path} holds no .txt and no .jsonl file")
        return [document for file in files for document in read_documents(file)]
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        found = "a file of another kind" if path.is_file() else "no such file"
        raise DataError(f"{path} is {found}: expected a .txt or .jsonl file, or a folder of such")
    if path.suffix == ".txt":
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no UTF-8 text: {error}") from None
    documents = []
    for record, where in JsonLines(path):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(f"{where} is {record!r:.80}, expected an object with `text`")
        documents.append(record["text"])
    return documents


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
