"""One self-contained HTML page about an evaluation: its scores, its pages, and the training curves."""

import base64
import difflib
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from parsit_jax.documents.images import ImageError, load_image
from parsit_jax.evaluation.curves import draw_curves, read_metrics
from parsit_jax.evaluation.metrics import METRICS, mean
from parsit_jax.evaluation.report_template import STYLE, TEMPLATE
from vishwamai.training.run import write_text

PAGES_SHOWN = 4  # of the worst and of the best, for each benchmark
LONGEST_SIDE = 900  # larger pages are embedded smaller
SMALL_PAGE = 400  # narrower pages are shown pixel by pixel


def write_report(output: Path, run: Path | None = None) -> Path:
    """Writes `output/report.html` and returns its path.

    Args:
        output: folder with the `results.json` and `predictions/` of an evaluation.
        run: folder with the `metrics.jsonl` and `config.yaml` of the training run, each left out of the report
            where it is not there; by default `output`.

    Raises:
        FileNotFoundError: there are no results, or a benchmark's predictions are missing.
        ValueError: a line of `metrics.jsonl` is no object with a step.
    """
    output = Path(output)
    run = output if run is None else Path(run)
    if not (output / "results.json").is_file():
        raise FileNotFoundError(f"no results.json in {output}: run eval.py first")
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    pages = {name: _pages(output / "predictions" / f"{name}.jsonl") for name in results["benchmarks"]}
    metrics, config = run / "metrics.jsonl", run / "config.yaml"
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    html = page.render(
        name=run.resolve().name,
        style=Markup(STYLE),
        facts=_facts(results),
        benchmarks=results["benchmarks"],
        breakdowns={name: _breakdown(of["by"]) for name, of in results["benchmarks"].items()},
        metrics=METRICS,
        page_counts={name: len(of) for name, of in pages.items()},
        pages={name: _pick(of, output) for name, of in pages.items()},
        curves=Markup(draw_curves(read_metrics(metrics))) if metrics.is_file() else "",
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )
    write_text(output / "report.html", html.strip() + "\n")
    return output / "report.html"


def _facts(results: dict) -> list[str]:
    facts = [] if results.get("step") is None else [f"step {results['step']:,}"]
    facts.append(results["date"].replace("T", " ").replace("+00:00", " UTC"))
    facts.append(f"evaluated in {results['seconds']:,.0f} s")
    if results["limit"] is not None:
        facts.append(f"only the first {results['limit']:,} questions of each benchmark")
    if unanswered := sum(len(of.get("unanswered", ())) for of in results["benchmarks"].values()):
        facts.append(f"{unanswered:,} questions longer than the context, which count as wrong")
    if "cache_dtype" in results:
        facts.append(f"past keys and values in {results['cache_dtype']}")
    return facts


def _breakdown(by: dict[str, dict]) -> dict[str, dict]:
    """The groups worth a table: one with a single value would repeat the whole."""
    return {group: values for group, values in by.items() if len(values) > 1}


def _pages(path: Path) -> list[list[dict]]:
    """Prediction rows of each page, from the page with the lowest mean ANLS to the one with the highest."""
    if not path.is_file():
        raise FileNotFoundError(
            f"results.json names a benchmark whose predictions are missing: {path}; run eval.py again"
        )
    pages: dict[str, list[dict]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            pages[row["page"]].append(row)
    return sorted(pages.values(), key=lambda rows: (_page_anls(rows), rows[0]["page"]))


def _page_anls(rows: Sequence[dict]) -> float:
    return mean(row["scores"]["anls"] for row in rows)


def _pick(pages: Sequence[list[dict]], output: Path) -> dict[str, list[dict]]:
    if len(pages) <= 2 * PAGES_SHOWN:
        return {"all pages": [_card(rows, output) for rows in pages]}
    return {
        "worst pages": [_card(rows, output) for rows in pages[:PAGES_SHOWN]],
        "best pages": [_card(rows, output) for rows in pages[: -PAGES_SHOWN - 1 : -1]],
    }


def _card(rows: Sequence[dict], output: Path) -> dict:
    image, width = _embed(output / rows[0]["image"])  # an absolute path stays what it is
    asked = [
        {
            "question": row["question"],
            "answers": row["answers"],
            "said": _said(row),
            "blanked": row["image_blanked"]["prediction"],
            "verdict": _verdict(row["scores"]),
        }
        for row in rows
    ]
    return {
        "page": rows[0]["page"],
        "anls": _page_anls(rows),
        "image": image,
        "enlarged": width < SMALL_PAGE,
        "asked": asked,
    }


def _verdict(scores: dict[str, float]) -> str:
    if scores["exact_match"] == 1.0:
        return "right"
    return "near" if scores["anls"] > 0 else "wrong"


def _said(row: dict) -> list[tuple[str, bool]]:
    """The prediction in pieces for the page: only in a near answer is it of use to see what differs."""
    if _verdict(row["scores"]) == "near":
        return _differences(row["prediction"], row["answers"])
    return [(row["prediction"], True)] if row["prediction"] else []


def _differences(prediction: str, answers: Sequence[str]) -> list[tuple[str, bool]]:
    """The prediction in pieces, each with whether the nearest answer has it too."""
    matchers = [difflib.SequenceMatcher(None, prediction.lower(), answer.lower(), autojunk=False) for answer in answers]
    nearest = max(matchers, key=lambda matcher: matcher.ratio())
    pieces = [(prediction[start:end], tag == "equal") for tag, start, end, _, _ in nearest.get_opcodes()]
    return [piece for piece in pieces if piece[0]]


def _embed(path: Path) -> tuple[str, int]:
    """A page as the model saw it, as a data URI, with its width in pixels; an empty URI if it can't be read now."""
    try:
        image = load_image(path)
    except ImageError:
        return "", 0
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    kind, options = ("PNG", {}) if image.width < SMALL_PAGE else ("JPEG", {"quality": 80})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}", image.width
