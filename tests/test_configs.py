"""Every config in configs/ is valid, says its own command, and fits its tokenizer; nothing is allocated."""

import math
from pathlib import Path
from pydoc_data.topics import topics

import jax
import pytest

from vishwamai import experiment as experiments
from vishwamai import families
from vishwamai.config import ConfigError
from vishwamai.convert.parameters import abstract_parameters
from vishwamai.data.documents import open_documents
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
    if (ROOT / experiment.tokenizer).is_dir():
        tokenizer = VishwamAITokenizer.from_pretrained(ROOT / experiment.tokenizer)
        assert tokenizer.vocab_size == family.text_config(experiment.model).vocab_size
    else:
        assert f" {experiment.tokenizer}\n" in header, "the header says how it is made"
    assert "dry run: nothing was allocated" in dry_run(experiment, family)


SIZES = {  # parameters in all
    "vishwamai_base": 0.76e9,
    "vishwamai_moe_16b": 15.6e9,
    "qwen3_1_7b": 1.72e9,
    "qwen3_8b": 8.19e9,
    "qwen3_30b_a3b": 30.53e9,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_named_size_is_that_size(name):
    experiment = experiments.load(ROOT / "configs" / f"{name}.yaml")
    abstract = abstract_parameters(families.get(experiment.family).build, experiment.model)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(abstract)) == pytest.approx(SIZES[name], rel=0.03)


@pytest.mark.parametrize("name", ["parsit_tiny", "vishwamai_tiny", *SIZES])
def test_a_model_uses_only_what_transformers_can_express(name):
    experiment = experiments.load(ROOT / "configs" / f"{name}.yaml")
    layout = families.get(experiment.family).layout
    assert layout.unsupported(experiment.model, experiment.data) == []


def test_vishwamai_tiny_learns_english_and_holds_some_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    experiment = experiments.load(ROOT / "configs" / "vishwamai_tiny.yaml")
    tokenizer = VishwamAITokenizer.from_pretrained(experiment.tokenizer)
    source = families.get(experiment.family).batch_source(experiment, tokenizer)
    (pool,) = source.streams
    learned = {tokenizer.decode(example.tokens) for row in range(len(pool.plan)) for example in source.row(row)}
    held_out = open_documents(experiment.data.held_out, experiment.seed)
    assert len(held_out) >= 0.1 * len(topics)
    starts = {text[:40] for text in learned if text.startswith("<s>")}
    assert len(starts) > 0.8 * len(topics)
    assert starts.isdisjoint(f"<s>{text}"[:40] for text in held_out)
    # Learned from real English: a token is several characters.
    characters = sum(len(text) for text in learned) / pool.tokens_per_epoch[0]
    assert characters > 2.5


def test_vishwamai_tinys_tokenizer_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = ROOT / "configs" / "tokenizers" / "vishwamai_tiny"
    ours, theirs = VishwamAITokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    for text in topics.values():
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_rows_longer_than_the_models_context_are_refused():
    path = ROOT / "configs" / "parsit_tiny.yaml"
    experiments.load(path, ["data.max_length=1024"])
    with pytest.raises(ConfigError, match=r"data.max_length=1025 .* max_position_embeddings=1024"):
        experiments.load(path, ["data.max_length=1025"])
