"""Score a trained model: checkpoint -> predictions -> scores -> report.

    python eval.py --checkpoint runs/parsit_tiny --benchmarks generated sroie --data sroie=DIR
    python eval.py --checkpoint runs/vishwamai_tiny --benchmarks perplexity

writes `results.json` into the run's folder (or `--output`), of a document model also `predictions/` and `report.html`.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kernels.decode_attention.quantized import LARGEST
from parsit_jax.documents.images import ImageError
from parsit_jax.evaluation.benchmarks import BENCHMARKS, BenchmarkError, load_benchmarks
from parsit_jax.evaluation.metrics import METRICS
from parsit_jax.evaluation.report import write_report
from parsit_jax.evaluation.run import evaluate
from parsit_jax.inference import ParsitInference
from vishwamai import VishwamAI
from vishwamai.checkpoint import CheckpointError, steps
from vishwamai.config import ConfigError, read_yaml, validate
from vishwamai.convert.source import open_source
from vishwamai.data.sources import DataError
from vishwamai.evaluation.run import BENCHMARKS as TEXT_BENCHMARKS
from vishwamai.evaluation.run import evaluate as evaluate_text
from vishwamai.evaluation.run import load_benchmarks as load_text_benchmarks
from vishwamai.experiment import EvaluationConfig


def main(arguments: list[str] | None = None) -> None:
    known = f"of a document model: {', '.join(BENCHMARKS)}; of a text model: {', '.join(TEXT_BENCHMARKS)}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="a run, one of its checkpoints, or an exported folder")
    add("--benchmarks", nargs="+", metavar="NAME", help=f"default: those of the run's config; known: {known}")
    add("--data", action="append", default=[], metavar="[NAME=]PATH", help="a benchmark's files; repeats")
    add("--limit", type=int, metavar="N", help="only the first N questions, or documents, of each")
    add("--output", type=Path, metavar="DIR", help="where results go; default: the run's folder")
    add("--seed", type=int, default=0, help="which held-out pages are drawn")
    add("--cache-dtype", choices=LARGEST, help="keep past keys and values in 8 bits while answering; default: no")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: expected at least 1")
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: expected at least 0")
    if not options.checkpoint.is_dir():
        parser.error(f"no folder {options.checkpoint}")

    # ------------------------------------------------------------------ what to score, and on what
    run = run_folder(options.checkpoint)
    output = options.output or run
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        is_text = open_source(options.checkpoint).family.build is VishwamAI.accepts
        settings = evaluation_settings(run / "config.yaml")
        names = options.benchmarks or settings.benchmarks
        if not names:
            known = TEXT_BENCHMARKS if is_text else BENCHMARKS
            parser.error(f"which benchmarks? --benchmarks takes {', '.join(known)}")
        limit = options.limit if options.benchmarks or options.limit else settings.limit
        if is_text:
            if options.cache_dtype:
                raise ConfigError("--cache-dtype: a text model's benchmarks write no answer, so they have no cache")
            model, run_benchmarks = VishwamAI.from_pretrained(options.checkpoint), evaluate_text
            benchmarks = load_text_benchmarks(names, options.data, model.experiment)
        else:
            benchmarks = load_benchmarks(names, options.data, options.seed)
            model, run_benchmarks = ParsitInference(options.checkpoint, cache_dtype=options.cache_dtype), evaluate

        # -------------------------------------------------------------- predictions and scores
        provenance = {"step": checkpoint_step(options.checkpoint), "seed": options.seed}
        if options.cache_dtype:
            provenance["cache_dtype"] = options.cache_dtype
        with Progress(*columns, console=console) as progress:
            tasks = {name: progress.add_task(name, total=None) for name in benchmarks}
            results = run_benchmarks(
                model,
                benchmarks,
                output=output,
                limit=limit,
                batch_size=settings.batch_size,
                provenance=provenance,
                on_progress=lambda name, done, total: progress.update(tasks[name], completed=done, total=total),
            )
    except (BenchmarkError, CheckpointError, ConfigError, DataError, ImageError, OSError) as error:
        parser.exit(1, f"error: {error}\n")

    # ------------------------------------------------------------------ report
    if is_text:
        console.print(perplexity_table(results))
        return
    console.print(score_table(results))
    for line in unanswered(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        report = write_report(output, run)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: the results are in {output}, but there is no report: {error}\n")
    with (output / "predictions" / f"{names[0]}.jsonl").open(encoding="utf-8") as file:
        sample = json.loads(file.readline())
    for title, text in {
        "report": report,
        "page": output / sample["image"],
        "asked": sample["question"],
        "model": sample["prediction"],
        "answer": " | ".join(sample["answers"]),
    }.items():
        console.print(f"{title:<7} {text}", markup=False, highlight=False, soft_wrap=True)


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to: `runs/x` for `runs/x/checkpoints/300`, any other path itself."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def evaluation_settings(config: Path) -> EvaluationConfig:
    """The `evaluation` section of a run's config; the defaults where there is no config."""
    section = read_yaml(config).get("evaluation", {}) if config.is_file() else {}
    return validate(EvaluationConfig, section, f"{config}, evaluation")


def checkpoint_step(checkpoint: Path) -> int | None:
    """The step of one checkpoint, or of a run's last complete one; None for a folder that was exported."""
    if checkpoint.parent.name == "checkpoints" and checkpoint.name.isdigit():
        return int(checkpoint.name)
    return max(steps(checkpoint), default=None)


def score_table(results: dict) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("benchmark", no_wrap=True)
    titles = [metric.title for metric in METRICS.values()]
    for title in ("asked", *titles, "blanked ANLS", "blanked exact match"):
        table.add_column(title, justify="right", min_width=max(map(len, title.split())))
    for name, of in results["benchmarks"].items():
        blanked = of["image_blanked"]
        scores = [*(of[metric] for metric in METRICS), blanked["anls"], blanked["exact_match"]]
        table.add_row(name, str(of["examples"]), *(f"{score:.3f}" for score in scores))
    return table


def unanswered(results: dict) -> Iterator[str]:
    """A line for each benchmark with questions that the model can't read."""
    for name, of in results["benchmarks"].items():
        for question, reason in itertools.islice(of["unanswered"].items(), 1):
            yield (
                f"{name}: {len(of['unanswered'])} of {of['examples']} questions were not answered and count as wrong; "
                f"{question} {reason}: take a model with a longer context, or smaller images (data.image_size)"
            )


def perplexity_table(results: dict) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("benchmark", no_wrap=True)
    for title in ("documents", "tokens", "perplexity", "bits per byte", "word perplexity"):
        table.add_column(title, justify="right")
    for name, of in results["benchmarks"].items():
        scores = (of[score] for score in ("perplexity", "bits_per_byte", "word_perplexity"))
        cells = ("-" if score is None else f"{score:.4g}" for score in scores)
        table.add_row(name, f"{of['documents']:,}", f"{of['tokens']:,}", *cells)
    return table


if __name__ == "__main__":
    main()
