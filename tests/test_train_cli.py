"""`train.py` as a user meets it: real config, data and tokenizer; killed in the middle of a step and of a save."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import train as train_script
from vishwamai import checkpoint
from vishwamai.config import ConfigError
from vishwamai.templates import load_template
from vishwamai.tiny_tokenizer import ALPHABET, PIECES, build_tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
family: qwen3
run_dir: {folder}/run
tokenizer: {folder}/tokenizer
model: {{vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, head_dim: 16}}
data: {{max_length: 96, datasets: [{{json_path: {folder}/sums.jsonl}}]}}
training: {{steps: 12, batch_size: 4}}
checkpoint: {{every: 4}}
logging: {{tensorboard: false}}
"""


@pytest.fixture
def config(tmp_path):
    """A config file; its data and tokenizer lie beside it."""
    build_tiny_tokenizer(ALPHABET, PIECES, load_template("qwen3"), tmp_path / "tokenizer")
    rows = [
        {"conversations": [{"from": "human", "value": f"{a}+{a}"}, {"from": "gpt", "value": str(a + a)}]}
        for a in range(40)
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def metrics(run_dir):
    """(step, loss, gradient norm) of every line."""
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def run(config, *arguments):
    return train_script.main(["--config", str(config), *arguments])


def test_train_resume_finish(config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(config, "training.steps=3", "optimizer.schedule=constant") == 0
    out = capsys.readouterr().out
    assert "part          trainable  frozen  carried" in out and "finished: 3 steps" in out
    assert {"config.yaml", "tokenizer", "metrics.jsonl", "checkpoints"} <= {path.name for path in folder.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "tokenizer" / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()

    # The same command again: finished, nothing changes.
    before = (folder / "metrics.jsonl").read_bytes()
    assert run(config, "training.steps=3", "optimizer.schedule=constant") == 0
    assert "is finished (3 steps)" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before

    # More steps, other logging, checkpoints and mesh: it goes on.
    changed = ["training.steps=5", "checkpoint.keep=1", "logging.every=1", "mesh.fsdp=2", "evaluation.limit=3"]
    assert run(config, "optimizer.schedule=constant", *changed) == 0
    assert "resuming" in capsys.readouterr().out
    assert [step for step, *_ in metrics(folder)] == [1, 2, 3, 4, 5]
    assert checkpoint.steps(folder) == [5]
    assert "steps: 5" in (folder / "config.yaml").read_text()

    # Anything else is an error that names the keys.
    with pytest.raises(ConfigError) as error:
        run(config, "training.steps=9", "optimizer.learning_rate=1e-2", "model.rope_theta=5e5")
    assert "optimizer.learning_rate: 0.0003 -> 0.01\n" in str(error.value)
    assert "optimizer.schedule: 'constant' -> 'cosine'\n" in str(error.value)
    assert "model.rope_theta: 1000000.0 -> 500000.0\n" in str(error.value)
    assert "training.steps" not in str(error.value)


def test_documents_and_conversations_mixed(config, tmp_path, capsys):
    """Also resumed between two lines of the log."""
    (tmp_path / "tales.txt").write_text("\n\n".join(f"Once {n} cats met {n + 1} dogs. " * n for n in range(1, 40)))
    tales = f'{{path: {tmp_path}/tales.txt, separator: "\\n\\n", weight: 3}}'
    data = f"data.datasets=[{tales}, {{json_path: {tmp_path}/sums.jsonl, weight: 1}}]"
    arguments = [data, "logging.every=4", "optimizer.schedule=constant"]
    assert run(config, *arguments, "--show-batch") == 0
    shown = capsys.readouterr().out
    assert re.search(r"-- example 1\n.⟦[^⟧]*cats met [^⟧]*⟧\n", shown)  # all is learned but the first token

    assert run(config, *arguments, f"run_dir={tmp_path}/whole") == 0
    assert run(config, *arguments, "training.steps=6") == 0
    assert run(config, *arguments) == 0
    told, whole = [
        [
            (line["step"], line["mixture/tales.txt"], line["mixture/sums.jsonl"])
            for line in map(json.loads, lines(folder))
        ]
        for folder in (tmp_path / "run", tmp_path / "whole")
    ]
    assert [step for step, *_ in whole] == [4, 8, 12]
    assert told[-2:] == whole[-2:] and all(tales + sums == pytest.approx(1) for _, tales, sums in whole)
    assert 0.6 < np.mean([tales for _, tales, _ in whole]) < 0.9
    assert metrics(tmp_path / "run")[-1] == metrics(tmp_path / "whole")[-1]


def test_a_run_starts_from_another(config, tmp_path):
    run(config, "training.steps=2")
    start = ["training.steps=1", f"run_dir={tmp_path}/second", "optimizer.learning_rate=1e-9", "mesh.fsdp=2"]
    run(config, *start, f"init_from={tmp_path}/run", "seed=5")
    assert abs(metrics(tmp_path / "second")[0][1] - metrics(tmp_path / "run")[1][1]) < 0.05
    from_scratch = [f"run_dir={tmp_path}/third", "training.steps=1", "seed=5"]
    run(config, *from_scratch)
    assert metrics(tmp_path / "third") != metrics(tmp_path / "second")


def test_show_batch_prints_and_exits(config, tmp_path, capsys):
    assert run(config, "--show-batch") == 0
    out = capsys.readouterr().out
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦" in out and "<|im_end|>⟧" in out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dry_run_needs_no_tokenizer_data_or_weights(config, tmp_path, capsys):
    assert (
        run(config, "--dry-run", "tokenizer=nowhere", "data.datasets=[{json_path: no.json}]", "init_from=none/x") == 0
    )
    out = capsys.readouterr().out
    assert "tokenizer: nowhere" in out and "learning_rate: 0.0003" in out
    assert "[2, 32, 64]" in out and "(-, fsdp, tensor)" in out
    assert "nothing was allocated" in out
    assert not (tmp_path / "run").exists()


def test_help(config, capsys):
    assert run(config, "--help") == 0
    assert "training.gradient_accumulation" in capsys.readouterr().out
    assert train_script.main(["--help"]) == 0
    assert "family: parsit" in capsys.readouterr().out


def test_a_config_that_cannot_be_used_leaves_no_run(config, tmp_path):
    for overrides, message in [
        (["optimiser.learning_rate=1"], "optimiser is not a key; did you mean optimizer"),
        (["tokenizer=nowhere"], "tokenizer: no tokenizer in nowhere"),
        (["training.trainable=[vision.*]"], "'vision.*' matches no parameter"),
        (["mesh.data=3"], "batch_size=4 is not a multiple of 3"),
    ]:
        with pytest.raises(ConfigError) as error:
            run(config, *overrides)
        assert message in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def start(config, *arguments, code=None, platforms="cpu"):
    """`python train.py` in a process of its own, with the compiled programs of the test suite."""
    command = [sys.executable, "train.py"] if code is None else [sys.executable, "-c", code]
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    environment = os.environ | {"JAX_PLATFORMS": platforms, "PYTHONPATH": str(ROOT)} | cache
    return subprocess.Popen(
        [*command, "--config", str(config), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return out + errors


def test_errors_and_exit_codes(config):
    text = finish(start(config, "training.step=5"), code=2)
    assert "error: " in text and "training.step is not a key; did you mean training.steps" in text
    assert "Traceback" not in text


def test_a_dry_run_starts_no_backend(tmp_path):
    """Nothing can be allocated where JAX has no device at all."""
    nowhere = ["tokenizer=nowhere", "init_from=none/x", f"run_dir={tmp_path}/run", "mesh.fsdp=4"]
    text = finish(start(ROOT / "configs" / "parsit_tiny.yaml", "--dry-run", *nowhere, platforms="no_such_platform"))
    assert "dry run: nothing was allocated" in text and "vision_tower" in text
    assert "backend" in finish(start(tmp_path, code=ANY_ARRAY, platforms="no_such_platform"), code=1)


ANY_ARRAY = "import jax.numpy; jax.numpy.zeros(1)"


@pytest.mark.slow
def test_nan_ends_the_process_with_the_culprit(config, tmp_path):
    text = finish(start(config, "optimizer.learning_rate=1e30"), code=1)
    (batch,) = (tmp_path / "run").glob("failed_step_*.npz")
    assert "has gradients that are not finite" in text and "NaN" in text and str(batch) in text
    assert "Traceback" not in text and checkpoint.steps(tmp_path / "run") == []


ROOM_FOR_ONE_CHECKPOINT = 900_000
LONG = ("training.steps=400", "checkpoint.every=60")  # some seconds of small steps


@pytest.fixture(scope="session")
def expected():
    """Metrics of runs that were never stopped, by their arguments."""
    return {}


@pytest.fixture
def uninterrupted(expected, config, tmp_path):
    """uninterrupted(*arguments) -> metrics of such a run."""

    def make(*arguments):
        if arguments not in expected:
            finish(start(config, *arguments, f"run_dir={tmp_path}/uninterrupted"))
            expected[arguments] = metrics(tmp_path / "uninterrupted")
        return expected[arguments]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("after", [20, 150])
def test_kill_in_the_middle_of_a_step(config, tmp_path, uninterrupted, after):
    """Before the first checkpoint, and after two."""
    process = start(config, *LONG)
    wait_for(lambda: len(lines(tmp_path / "run")) >= after, process)
    process.kill()
    process.communicate()
    assert len(lines(tmp_path / "run")) < 400
    assert ("resuming" in finish(start(config, *LONG))) == (after > 60)
    assert metrics(tmp_path / "run") == uninterrupted(*LONG)


# Ends its own process with SIGKILL as soon as the folder of an unfinished second checkpoint stands there.
KILLED_WHILE_SAVING = """
import glob, os, signal, sys, threading
import train
pattern = sys.argv.pop()
def watch():
    while not glob.glob(pattern):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8])
def test_kill_in_the_middle_of_a_save(config, tmp_path, uninterrupted, step):
    unfinished = tmp_path / "run" / "checkpoints" / f"{step}.orbax-checkpoint-tmp*"
    finish(start(config, str(unfinished), code=KILLED_WHILE_SAVING), code=-signal.SIGKILL)
    assert list(unfinished.parent.glob(unfinished.name))
    assert checkpoint.steps(tmp_path / "run") == [4][: step // 4 - 1]
    assert f"{step}.orbax-checkpoint-tmp was never finished" in finish(start(config))
    assert metrics(tmp_path / "run") == uninterrupted()


@pytest.mark.slow
def test_a_full_disk_is_told_and_nothing_is_lost(config, small_disk, uninterrupted):
    arguments = (f"run_dir={small_disk}/run", "logging.tensorboard=true")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(int(shutil.disk_usage(small_disk).free - ROOM_FOR_ONE_CHECKPOINT)))
    text = finish(start(config, *arguments), code=1)
    assert "error: checkpoint 8 could not be written" in text and "no space left" in text
    assert "checkpoint 4 is complete" in text and "Traceback" not in text
    filler.unlink()
    assert "resuming" in finish(start(config, *arguments))
    assert metrics(small_disk / "run") == uninterrupted()


@pytest.mark.slow
def test_sigterm_saves_and_exits(config, tmp_path, uninterrupted):
    process = start(config, *LONG)
    wait_for(lambda: len(lines(tmp_path / "run")) >= 70, process)
    process.terminate()
    text = finish(process, code=128 + signal.SIGTERM)
    assert "SIGTERM: saved after step" in text
    assert checkpoint.latest_step(tmp_path / "run") == len(lines(tmp_path / "run")) < 400
    finish(start(config, *LONG))
    assert metrics(tmp_path / "run") == uninterrupted(*LONG)


@pytest.mark.slow
def test_simulates_the_devices_that_the_mesh_needs(config):
    text = finish(start(config, "mesh.data=2", "mesh.fsdp=-1", "mesh.tensor=2", "training.steps=1"))
    assert "finished: 1 steps" in text


def lines(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, process):
    until = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)
