"""What a model is scored on: a registry from a benchmark's name to its questions.

Generated benchmarks draw held-out pages and need no files; the others read a folder, given as `NAME=DIR`, or
as a bare `DIR` whose layout says which benchmark it is.
"""

import difflib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from parsit_jax.documents.generator import Split, fonts_of, generate, layouts_of

QUESTIONS = 330  # per generated benchmark: the standard error of a score is then below 0.03
QUESTIONS_PER_PAGE = 3  # few, so that many pages are seen: questions about one page succeed and fail together
PAGES_PER_SEED = 1_000_000


class BenchmarkError(ValueError):
    """A benchmark that cannot be asked: its name, its data or its files are wrong; the message says how."""


@dataclass(frozen=True)
class Example:
    """One question about one page.

    `id` is unique within the benchmark, `page` names the page, `groups` holds what scores are broken down by
    (`{"field": "total", "layout": "…"}`).
    """

    id: str
    page: str
    image: Path | Image.Image
    question: str
    answers: tuple[str, ...]
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """How to get a benchmark's examples: `load(folder, seed)`.

    `recognises` tells whether a folder holds this benchmark's files; None for one that needs none. The seed
    picks which pages a generated benchmark draws, a stored one is always read in the order of its file.
    """

    description: str
    load: Callable[[Path | None, int], Iterator[Example]]
    recognises: Callable[[Path], bool] | None = None


def load_benchmarks(names: Sequence[str], data: Sequence[str] = (), seed: int = 0) -> dict[str, Iterator[Example]]:
    """The examples of each named benchmark, read or drawn one by one as they are asked for.

    Args:
        names: names from `BENCHMARKS`.
        data: where stored benchmarks lie, each `NAME=DIR` or a bare `DIR`.
        seed: which pages generated benchmarks draw.

    Raises:
        BenchmarkError: an unknown name, a benchmark without its data, data that no named benchmark uses, or a
            folder that no benchmark recognises.
    """
    for name in names:
        _require_known(name)
    folders = resolve_data(data)
    for name, folder in folders.items():
        if name not in names:
            raise BenchmarkError(f"{folder} holds {name!r}, not one of the benchmarks {', '.join(names)}")
    for name in names:
        if BENCHMARKS[name].recognises and name not in folders:
            raise BenchmarkError(f"benchmark {name!r} needs data, and none was given: add --data {name}=DIR")
    return {name: BENCHMARKS[name].load(folders.get(name), seed) for name in names}


def resolve_data(data: Sequence[str]) -> dict[str, Path]:
    """Benchmark name -> folder, from `NAME=DIR` or bare `DIR` entries; raises as `load_benchmarks`."""
    folders: dict[str, Path] = {}
    for entry in data:
        name, separator, folder = entry.partition("=")
        if not separator or Path(entry).is_dir():
            name, folder = _recognise(Path(entry)), entry
        _require_known(name)
        recognises = BENCHMARKS[name].recognises
        if recognises is None:
            raise BenchmarkError(f"benchmark {name!r} draws its own pages: leave out --data {entry}")
        if not Path(folder).is_dir():
            raise BenchmarkError(f"the data of {name!r} should be a folder, and there is none at {folder}")
        if not recognises(Path(folder)):
            raise BenchmarkError(f"{folder} does not look like {name!r}: expected {BENCHMARKS[name].description}")
        if name in folders:
            raise BenchmarkError(f"two folders for {name!r}: {folders[name]} and {folder}")
        folders[name] = Path(folder)
    return folders


def _recognise(folder: Path) -> str:
    if not folder.is_dir():
        raise BenchmarkError(f"--data takes NAME=DIR or a folder, and {folder} is no folder")
    stored = {name: benchmark for name, benchmark in BENCHMARKS.items() if benchmark.recognises}
    for name, benchmark in stored.items():
        if benchmark.recognises(folder):
            return name
    known = "; ".join(f"{name}: {benchmark.description}" for name, benchmark in stored.items())
    raise BenchmarkError(f"{folder} looks like no benchmark's data, expected one of these: {known}")


def _require_known(name: str) -> None:
    if name not in BENCHMARKS:
        nearest = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise BenchmarkError(f"unknown benchmark {name!r}: {hint}Known: {', '.join(BENCHMARKS)}")


def _generated(kind: str, unseen_appearance: bool = True) -> Callable[[Path | None, int], Iterator[Example]]:
    """`QUESTIONS` questions about held-out pages of one kind; a seed gives the same ones on every machine."""

    def examples(seed: int) -> Iterator[Example]:
        for number in itertools.count():
            page = f"{kind}-{seed}-{number:04d}"
            chooser = random.Random(page)
            appearance = {} if unseen_appearance else _seen_appearance(kind, chooser)
            document = generate(kind, seed * PAGES_PER_SEED + number, Split.HELD_OUT, **appearance)
            count = min(QUESTIONS_PER_PAGE, len(document.questions))
            for index in sorted(chooser.sample(range(len(document.questions)), count)):
                question = document.questions[index]
                yield Example(
                    id=f"{page}-{index}",
                    page=page,
                    image=document.image,
                    question=question.text,
                    answers=(question.answer,),
                    groups={"field": question.field, "layout": document.layout, "font": document.font},
                )

    return lambda _, seed: itertools.islice(examples(seed), QUESTIONS)


def _seen_appearance(kind: str, chooser: random.Random) -> dict[str, str]:
    layout, font = layouts_of(kind, Split.TRAIN), fonts_of(Split.TRAIN)
    return {"layout": chooser.choice(layout), "font": chooser.choice(font)}


SROIE_QUESTIONS = {
    "company": "What is the company name?",
    "date": "What is the date?",
    "address": "What is the address?",
    "total": "What is the total?",
}


def _is_sroie(folder: Path) -> bool:
    if not (folder / "validation.jsonl").is_file():
        return False
    try:
        row = next(_read_jsonl(folder / "validation.jsonl", required=("label",)), {"label": None})
    except BenchmarkError:
        return False
    return isinstance(row["label"], dict) and bool(row["label"]) and set(row["label"]) <= set(SROIE_QUESTIONS)


def _sroie(folder: Path | None, seed: int) -> Iterator[Example]:
    """ICDAR 2019 SROIE, task 3 (Huang et al., 2019): four fields of scanned receipts, where labelled."""
    assert folder is not None
    for row in _read_jsonl(folder / "validation.jsonl", required=("id", "image", "label")):
        page, image, label = str(row["id"]), folder / str(row["image"]), row["label"]
        if not image.is_file():
            raise BenchmarkError(f"receipt {page} names the image {image}, which is missing")
        if not isinstance(label, dict):
            raise BenchmarkError(f"receipt {page} has the label {label!r:.80}, expected an object of fields and values")
        for name, question in SROIE_QUESTIONS.items():
            answer = str(label.get(name) or "").strip()
            if answer:
                yield Example(f"{page}-{name}", page, image, question, (answer,), {"field": name})


def _read_jsonl(path: Path, required: Sequence[str]) -> Iterator[dict]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise BenchmarkError(f"{path}, line {number}: not JSON ({error})") from None
            missing = [key for key in required if not isinstance(row, dict) or key not in row]
            if missing:
                raise BenchmarkError(f"{path}, line {number}: expected an object with {required}, no {missing[0]!r}")
            yield row


BENCHMARKS = {
    "generated": Benchmark("receipts", _generated("receipts")),
    "generated_seen_layouts": Benchmark(
        "receipts in layouts and fonts that were trained on, with values that were not",
        _generated("receipts", unseen_appearance=False),
    ),
    "generated_invoices": Benchmark("invoices", _generated("invoices")),
    "generated_forms": Benchmark("forms", _generated("forms")),
    "generated_tables": Benchmark("tables", _generated("tables")),
    "generated_charts": Benchmark("charts", _generated("charts")),
    "sroie": Benchmark(
        "validation.jsonl with rows of {id, image, label: {company, date, address, total}}",
        _sroie,
        recognises=_is_sroie,
    ),
}
