"""Every config in configs/ is valid, says its own command, and fits its tokenizer; nothing is allocated."""

from pathlib import Path

import pytest

from vishwamai import experiment as experiments
from vishwamai import families
from vishwamai.config import ConfigError
from vishwamai.tokenizer import VishwamAITokenizer
from vishwamai.training.summary import dry_run

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert ROOT / "configs" / "parsit_tiny.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_valid_and_says_its_command(path):
    experiment = experiments.load(path)
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert f"python train.py --config configs/{path.name}" in header
    assert Path(experiment.run_dir).name == path.stem
    family = families.get(experiment.family)
    tokenizer = VishwamAITokenizer.from_pretrained(ROOT / experiment.tokenizer)
    assert tokenizer.vocab_size == family.text_config(experiment.model).vocab_size
    assert "dry run: nothing was allocated" in dry_run(experiment, family)


def test_parsit_tiny_uses_only_what_transformers_can_express():
    experiment = experiments.load(ROOT / "configs" / "parsit_tiny.yaml")
    layout = families.get("parsit").layout
    assert layout.unsupported(experiment.model, experiment.data) == []


def test_rows_longer_than_the_models_context_are_refused():
    path = ROOT / "configs" / "parsit_tiny.yaml"
    experiments.load(path, ["data.max_length=1024"])
    with pytest.raises(ConfigError, match=r"data.max_length=1025 .* max_position_embeddings=1024"):
        experiments.load(path, ["data.max_length=1025"])
