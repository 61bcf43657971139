"""`eval.py` on text models: a run and an exported folder, what is read, what is written, what goes wrong."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from vishwamai import VishwamAI
from vishwamai.convert.from_hf import from_hf
from vishwamai.evaluation.perplexity import perplexity

EVAL = Path(__file__).parents[3] / "eval.py"
DOCUMENTS = ["The total is 12.50.", "Who signed? " * 20, "", "x y"]


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("eval_command_of_text", EVAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def run(text_folder, tmp_path) -> Path:
    from_hf(text_folder, tmp_path / "run")
    with (tmp_path / "run" / "config.yaml").open("a") as file:
        file.write("evaluation: {benchmarks: [perplexity], limit: 2, batch_size: 3}\n")
    return tmp_path / "run"


@pytest.fixture
def held_out(tmp_path) -> Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": document, "id": 1}) + "\n" for document in DOCUMENTS))
    return path


def scores_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_is_scored_as_its_config_says(command, run, held_out, capsys):
    command(["--checkpoint", str(run), "--data", f"perplexity={held_out}"])
    results = scores_in(run)
    found = results["benchmarks"]["perplexity"]
    wanted = perplexity(VishwamAI.from_pretrained(run), DOCUMENTS[:2])
    assert found["documents"] == results["limit"] == 2 and results["step"] == 0
    assert found["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)
    assert set(found) == set(vars(wanted))
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity   ")]
    scores = (wanted.perplexity, wanted.bits_per_byte, wanted.word_perplexity)
    assert row[1:] == ["2", str(wanted.tokens), *(f"{score:.4g}" for score in scores)]


def test_what_a_run_held_out(command, run, held_out, tmp_path):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    entry = {"path": str(held_out), "sampling_strategy": "first:2"}
    data = {"max_length": 32, "datasets": [{"path": str(held_out)}], "held_out": [entry]}
    fixed = {"run_dir": str(run), "tokenizer": "unused", "training": {"steps": 1, "batch_size": 1}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree | fixed | {"data": data}))
    command(["--checkpoint", str(run), "--benchmarks", "perplexity"])
    wanted = perplexity(VishwamAI.from_pretrained(run), DOCUMENTS[:2])
    assert scores_in(run)["benchmarks"]["perplexity"]["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)


def test_an_exported_folder_named_benchmarks_and_another_output(command, text_folder, held_out, tmp_path, caplog):
    before = sorted(text_folder.iterdir())
    call = ["--checkpoint", str(text_folder), "--benchmarks", "perplexity", "--output", str(tmp_path / "scores")]
    command([*call, "--data", f"perplexity={held_out}"])
    results = scores_in(tmp_path / "scores")
    assert results["benchmarks"]["perplexity"]["documents"] == 3 and results["limit"] is None
    assert results["benchmarks"]["perplexity"]["empty_documents"] == 1 and results["step"] is None
    assert "1 of 4 documents are empty and were left out" in caplog.messages
    assert sorted(text_folder.iterdir()) == before
    command([*call, "--data", f"perplexity={held_out}", "--limit", "1"])
    assert scores_in(tmp_path / "scores")["benchmarks"]["perplexity"]["documents"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "benchmark 'perplexity' needs held-out text: add --data perplexity=PATH, or train with data.held_out"),
        (["--benchmarks", "perplexty"], "did you mean 'perplexity'? A text model can be scored on: perplexity"),
        (["--benchmarks", "sroie"], "unknown benchmark 'sroie': A text model can be scored on: perplexity"),
        (["--cache-dtype", "int8"], "--cache-dtype: a text model's benchmarks write no answer"),
        (["--data", "x.txt"], "--data x.txt: expected NAME=PATH, NAME being perplexity"),
        (["--data", "perplexity=a", "--data", "perplexity=b"], "two texts for 'perplexity': a and b"),
        (["--data", "perplexity=nowhere.txt"], "no data file nowhere.txt"),
    ],
)
def test_errors_are_one_line(command, run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command(["--checkpoint", str(run), *arguments])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err
    assert not (run / "results.json").exists()


def test_without_benchmarks_it_says_which_there_are(command, text_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        command(["--checkpoint", str(text_folder)])
    assert stop.value.code == 2
    assert "which benchmarks? --benchmarks takes perplexity\n" in capsys.readouterr().err
