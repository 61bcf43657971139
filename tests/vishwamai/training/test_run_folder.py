"""The folder of a run: what it keeps, and when it may be resumed."""

import pytest

from vishwamai import experiment as experiments
from vishwamai.config import ConfigError, dump_yaml
from vishwamai.templates import load_template
from vishwamai.tiny_tokenizer import ALPHABET, PIECES, build_tiny_tokenizer
from vishwamai.tokenizer import VishwamAITokenizer
from vishwamai.training.run import create_run, saved_step

MODEL = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture
def experiment(tmp_path):
    """experiment(optimizer={...}) -> a validated Experiment."""

    def make(**sections):
        fixed = dict(family="qwen3", run_dir=str(tmp_path / "run"), tokenizer="none", training={"steps": 9})
        fixed["training"]["batch_size"] = 4
        model = MODEL | {"num_key_value_heads": 1, "head_dim": 16}
        data = {"max_length": 96, "datasets": [{"json_path": "none.jsonl"}]}
        return experiments.parse({**fixed, "model": model, "data": data, **sections}, "test")

    return make


def tokenizer(folder, pieces):
    build_tiny_tokenizer(ALPHABET, pieces, load_template("qwen3"), folder)
    return VishwamAITokenizer.from_pretrained(folder)


def finish_step(run_dir, step):
    """A folder that looks like a complete checkpoint."""
    folder = run_dir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "_CHECKPOINT_METADATA").write_text("{}")


def test_a_run_without_a_checkpoint_takes_the_tokenizer_that_it_is_given_now(experiment, tmp_path):
    first, second = tokenizer(tmp_path / "first", ()), tokenizer(tmp_path / "second", PIECES)
    create_run(experiment(), first)
    (tmp_path / "run" / "tokenizer" / "merges.txt").write_text("of the first only")
    create_run(experiment(), second)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run" / "tokenizer").iterdir()}
    assert kept == {path.name: path.read_bytes() for path in second.folder.iterdir()}
    own = VishwamAITokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    create_run(experiment(), own)  # as when it resumes
    assert kept == {path.name: path.read_bytes() for path in own.folder.iterdir()}


def test_a_changed_config_is_told_key_by_key(experiment, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert saved_step(experiment()) == 0
    started = experiment(optimizer={"learning_rate_scales": {"layers.*": 0.1}})
    (run_dir / "config.yaml").write_text(dump_yaml(started))
    finish_step(run_dir, 3)
    assert saved_step(started) == 3
    free = {"logging": {"every": 7}, "evaluation": {"limit": 3}, "mesh": {"fsdp": 2}, "training": {"steps": 99}}
    free["training"]["batch_size"] = 4
    assert saved_step(experiment(optimizer={"learning_rate_scales": {"layers.*": 0.1}}, **free)) == 3
    with pytest.raises(ConfigError) as error:
        saved_step(experiment(optimizer={"learning_rate_scales": {"layers.*": 0.5, "norm.*": 2}}, seed=5, **free))
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[1:-1] == [
        "seed: 0 -> 5",
        "optimizer.learning_rate_scales.layers.*: 0.1 -> 0.5",
        "optimizer.learning_rate_scales.norm.*: None -> 2.0",
    ]


def test_converted_weights_are_no_run_to_resume(experiment, tmp_path):
    finish_step(tmp_path / "run", 0)
    (tmp_path / "run" / "config.yaml").write_text("{family: qwen3, model: {}}")
    with pytest.raises(ConfigError, match="converted weights.*init_from="):
        saved_step(experiment())
