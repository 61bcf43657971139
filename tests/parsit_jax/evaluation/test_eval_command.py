"""`eval.py` with a stand-in for the model: options, defaults, files, and what goes wrong."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hf_folders import model_config
from PIL import Image

from parsit_jax.evaluation.benchmarks import load_benchmarks
from vishwamai import families
from vishwamai.checkpoint import CheckpointError
from vishwamai.checkpoint.arrays import COMMITTED
from vishwamai.generation.prompts import TooLongError

EVAL = Path(__file__).parents[3] / "eval.py"


@cache
def drawn_examples():
    return tuple(load_benchmarks(["generated"])["generated"])


@pytest.fixture
def command(monkeypatch, Oracle):
    """`eval.py`'s main, with a model that reads every generated receipt and keeps how it was opened."""
    oracle = Oracle(drawn_examples())
    opened = lambda checkpoint, **options: vars(oracle).update(options) or oracle  # noqa: E731
    inference = SimpleNamespace(ParsitInference=opened)
    monkeypatch.setitem(sys.modules, "parsit_jax.inference", inference)
    spec = importlib.util.spec_from_file_location("eval_command", EVAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main.__globals__["oracle"] = oracle
    return module.main


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    for step in ("90", "200", "250", "300.orbax-checkpoint-tmp"):
        (folder / "checkpoints" / step).mkdir(parents=True)
        if step != "250":  # half-written
            (folder / "checkpoints" / step / COMMITTED).touch()
    write_config(folder, benchmarks=["generated"], limit=9, batch_size=4)
    return folder


def write_config(folder: Path, **evaluation) -> None:
    model = model_config("parsit").model_dump(mode="json")
    config = {"family": "parsit", "model": model, "evaluation": evaluation}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_scores_report_and_one_sample(command, run, capsys):
    command(["--checkpoint", str(run), "--benchmarks", "generated"])
    results = results_of(run)
    assert results["step"] == 200 and results["limit"] is None
    assert results["benchmarks"]["generated"]["anls"] == 1.0
    assert results["benchmarks"]["generated"]["examples"] >= 300
    assert (run / "report.html").is_file()
    first = json.loads((run / "predictions" / "generated.jsonl").open().readline())
    printed = capsys.readouterr().out
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("generated  ") and "━" not in line]
    assert row[1:6] == [
        str(results["benchmarks"]["generated"]["examples"]),
        "1.000",
        "1.000",
        "1.000",
        "0.000",
    ]
    for line in (
        f"report  {run / 'report.html'}",
        f"page    {run / first['image']}",
        f"asked   {first['question']}",
        f"model   {first['prediction']}",
        f"answer  {first['answers'][0]}",
    ):
        assert line in printed.splitlines()


def test_the_runs_config_says_what_to_score_by_default(command, run):
    command(["--checkpoint", str(run / "checkpoints" / "90")])
    assert results_of(run)["limit"] == results_of(run)["benchmarks"]["generated"]["examples"] == 9
    assert results_of(run)["step"] == 90
    command(["--checkpoint", str(run), "--limit", "5"])
    assert results_of(run)["benchmarks"]["generated"]["examples"] == 5


def test_an_exported_folder_and_another_output(command, tmp_path):
    exported, output = tmp_path / "exported", tmp_path / "scores"
    exported.mkdir()
    (exported / "config.json").write_text(
        json.dumps(families.get("parsit").layout.write_config(model_config("parsit")))
    )
    arguments = ["--checkpoint", str(exported), "--benchmarks", "generated", "--limit", "5"]
    command([*arguments, "--output", str(output), "--seed", "1"])
    assert [path.name for path in exported.iterdir()] == ["config.json"]
    assert results_of(output)["step"] is None and results_of(output)["seed"] == 1
    assert results_of(output)["benchmarks"]["generated"]["anls"] == 0.0  # other pages than the model knows
    assert (output / "report.html").is_file()


def test_questions_beyond_the_context_are_told_at_the_end(command, run, capsys, monkeypatch):
    oracle = command.__globals__["oracle"]
    answer, refused = oracle.answer_batch, drawn_examples()[0].question

    def short(images, questions):
        if refused in questions:
            long = {i: "needs 99 tokens, the context holds 9" for i, text in enumerate(questions) if text == refused}
            raise TooLongError(long, "ask less")
        return answer(images, questions)

    monkeypatch.setattr(oracle, "answer_batch", short)
    command(["--checkpoint", str(run), "--limit", "5"])
    ids = [example.id for example in drawn_examples()[:5] if example.question == refused]
    assert results_of(run)["benchmarks"]["generated"]["anls"] == 1 - len(ids) / 5
    told = f"generated: {len(ids)} of 5 questions were not answered and count as wrong; {ids[0]} needs 99 tokens, the "
    assert told + "context holds 9: take a model with a longer context, or smaller" in capsys.readouterr().out


def test_a_quantised_cache_is_told_in_the_results(command, run):
    command(["--checkpoint", str(run), "--limit", "5", "--cache-dtype", "int8"])
    assert command.__globals__["oracle"].cache_dtype == "int8" == results_of(run)["cache_dtype"]
    assert "past keys and values in int8" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{run}/none"], "no folder {run}/none"),
        (["--checkpoint", "{run}/checkpoints/90", "--limit", "0"], "--limit 0: expected at least 1"),
        (["--checkpoint", "{run}", "--seed", "-1"], "--seed -1: expected at least 0"),
        (["--checkpoint", "{run}", "--cache-dtype", "int4"], "choose from 'int8', 'float8_e4m3fn'"),
        (["--checkpoint", "{run}", "--benchmarks", "generatd"], "did you mean 'generated'"),
        (["--checkpoint", "{run}", "--benchmarks", "sroie"], "add --data sroie=DIR"),
        (["--checkpoint", "{run}/checkpoints"], "{run}/checkpoints is neither a run (config.yaml) nor a Hugging"),
    ],
)
def test_errors_are_one_line(command, run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command([argument.format(run=run) for argument in arguments])
    assert stop.value.code in (1, 2)
    assert message.format(run=run) in capsys.readouterr().err


def test_without_benchmarks_it_says_which_there_are(command, run, capsys):
    write_config(run)
    with pytest.raises(SystemExit):
        command(["--checkpoint", str(run)])
    assert "which benchmarks? --benchmarks takes generated, " in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_used_is_one_line(command, run, capsys, monkeypatch):
    def refuse(folder, **options):
        raise CheckpointError(f"{folder} is of another model")

    monkeypatch.setitem(command.__globals__, "ParsitInference", refuse)
    with pytest.raises(SystemExit) as stop:
        command(["--checkpoint", str(run)])
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: {run} is of another model\n"


def test_a_damaged_page_is_one_line_and_nothing_was_asked(command, run, tmp_path, capsys):
    Image.new("L", (64, 64)).save(tmp_path / "7.png")
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:60])
    row = {"id": "7", "image": "7.png", "label": {"total": "9.00"}}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as stop:
        command(["--checkpoint", str(run), "--benchmarks", "generated", "sroie", "--data", f"sroie={tmp_path}"])
    assert stop.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "7.png") in line and "truncated or damaged" in line
    assert not (run / "predictions").exists() and not (run / "results.json").exists()


def test_results_outlive_a_report_that_cannot_be_written(command, run, capsys):
    (run / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(SystemExit) as stop:
        command(["--checkpoint", str(run), "--limit", "5"])
    assert stop.value.code == 1 and results_of(run)["benchmarks"]["generated"]["examples"] == 5
    assert "metrics.jsonl, line 1" in capsys.readouterr().err
