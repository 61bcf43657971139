"""Ask a model a benchmark's questions; write its answers (`predictions/`) and scores (`results.json`)."""

import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from parsit_jax.documents.images import load_image
from parsit_jax.evaluation.benchmarks import BenchmarkError, Example
from parsit_jax.evaluation.metrics import METRICS, mean
from vishwamai.evaluation.results import write_results
from vishwamai.generation.prompts import TooLongError

Page = Path | Image.Image


class Answerer(Protocol):
    """What is evaluated: `ParsitInference`, or anything else that answers one question about each image.

    It raises TooLongError for those that it can't read: it is asked the others once more.
    """

    def answer_batch(self, images: Sequence[Page], questions: Sequence[str]) -> list[str]: ...


def evaluate(
    answerer: Answerer,
    benchmarks: Mapping[str, Iterable[Example]],
    *,
    output: Path,
    limit: int | None = None,
    batch_size: int = 16,
    provenance: Mapping[str, object] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict:
    """Scores `answerer` on every benchmark, and again with each image replaced by an empty page.

    The second score says how much can be had without reading: from the question, and from the generator's
    regularities. The answerer is taken to be deterministic, so an empty page of one size is asked each
    question once.

    Args:
        benchmarks: name -> examples, as `load_benchmarks` gives them. output: folder for
        `predictions/<benchmark>.jsonl`, `pages/<benchmark>/` (drawn pages) and `results.json`. limit: ask
        only the first so many questions of each benchmark. batch_size: questions per call of `answer_batch`.
        provenance: more top-level entries for `results.json`, such as the checkpoint's step. on_progress:
        called with (benchmark, questions asked, questions in all) after each batch.

    Returns:
        What `results.json` holds: `{"benchmarks": {name: scores}, "date", "seconds", "limit", **provenance}`,
        where scores are the means of each metric, `examples`, `by` (field or layout -> value -> scores),
        `image_blanked` (scores) and `unanswered` (id -> why: it is longer than the model's context; the answer is empty
        and counts).

    Raises:
        BenchmarkError: a benchmark has no examples, or wrong files.
        ImageError: a page can't be read. Both are found before the first question is asked.
        ValueError: the answerer did not give one answer per question.
    """
    start = time.monotonic()
    output = Path(output)
    asked, sizes = {}, {}
    for name, examples in benchmarks.items():
        asked[name] = list(itertools.islice(examples, limit))
        if not asked[name]:
            raise BenchmarkError(f"benchmark {name!r} has no questions to ask (limit: {limit})")
        pages = {example.page: example.image for example in asked[name]}
        sizes[name] = {page: load_image(image).size for page, image in pages.items()}
    scores = {}
    for name, examples in asked.items():
        rows = _ask(answerer, name, examples, sizes[name], output, batch_size, on_progress)
        scores[name] = _summarise(rows)
    return write_results(output, scores, start=start, limit=limit, provenance=provenance)


def _ask(
    answerer: Answerer,
    name: str,
    examples: Sequence[Example],
    sizes: Mapping[str, tuple[int, int]],
    output: Path,
    batch_size: int,
    on_progress: Callable[[str, int, int], None],
) -> list[dict]:
    """One row per example, also streamed to `predictions/<name>.jsonl` (`.partial` until it is complete).

    `sizes` of pages are those of the empty ones.
    """
    blank_questions = sorted({(sizes[example.page], example.question) for example in examples})
    total, done = len(blank_questions) + len(examples), 0
    blank_answers: dict[tuple[tuple[int, int], str], str] = {}
    for batch in _batches(blank_questions, batch_size):
        images = [Image.new("RGB", size, "white") for size, _ in batch]
        answered = _answer(answerer, images, [question for _, question in batch])
        blank_answers.update(zip(batch, answered.answers, strict=True))
        done += len(batch)
        on_progress(name, done, total)

    path = output / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    rows: list[dict] = []
    with partial.open("w", encoding="utf-8") as file:
        for batch in _batches(examples, batch_size):
            answered = _answer(answerer, [e.image for e in batch], [e.question for e in batch])
            for place, (example, prediction) in enumerate(zip(batch, answered.answers, strict=True)):
                blank = blank_answers[sizes[example.page], example.question]
                row = {
                    "id": example.id,
                    "page": example.page,
                    "image": _page_path(example, output, name),
                    "question": example.question,
                    "answers": list(example.answers),
                    "prediction": prediction,
                    "scores": _score(prediction, example.answers),
                    "image_blanked": {"prediction": blank, "scores": _score(blank, example.answers)},
                    "groups": dict(example.groups),
                    "unanswered": answered.too_long.get(place),
                }
                rows.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
            done += len(batch)
            on_progress(name, done, total)
    os.replace(partial, path)
    return rows


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


class _Answered(NamedTuple):
    """answers: one to each question. too_long: to which there is none, by place, and why."""

    answers: list[str]
    too_long: Mapping[int, str]


def _answer(answerer: Answerer, images: Sequence[Page], questions: Sequence[str]) -> _Answered:
    try:
        answers, too_long = answerer.answer_batch(images, questions), {}
    except TooLongError as error:
        too_long = error.reasons
        short = [place for place in range(len(questions)) if place not in too_long]
        found = answerer.answer_batch([images[place] for place in short], [questions[place] for place in short])
        by_place = dict(zip(short, found, strict=True))
        answers = [by_place.get(place, "") for place in range(len(questions))]
    if len(answers) != len(questions):
        raise ValueError(f"the model gave {len(answers)} answers to {len(questions)} questions")
    return _Answered([answer.strip() for answer in answers], too_long)


def _score(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    return {name: metric.score(prediction, answers) for name, metric in METRICS.items()}


def _page_path(example: Example, output: Path, benchmark: str) -> str:
    """Where the page lies: a drawn one is saved, and named relative to `output`; a file stays where it is."""
    if not isinstance(example.image, Image.Image):
        return str(example.image.resolve())
    path = Path("pages", benchmark, f"{example.page}.png")
    (output / path).parent.mkdir(parents=True, exist_ok=True)
    example.image.save(output / path)
    return path.as_posix()


def _summarise(rows: Sequence[dict]) -> dict:
    groups: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for group, value in row["groups"].items():
            groups[group][value].append(row["scores"])
    return {
        **_mean_scores([row["scores"] for row in rows]),
        "examples": len(rows),
        "by": {
            group: {value: {**_mean_scores(of), "examples": len(of)} for value, of in sorted(values.items())}
            for group, values in sorted(groups.items())
        },
        "image_blanked": _mean_scores([row["image_blanked"]["scores"] for row in rows]),
        "unanswered": {row["id"]: row["unanswered"] for row in rows if row["unanswered"]},
    }


def _mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: mean(score[metric] for score in scores) for metric in METRICS}
