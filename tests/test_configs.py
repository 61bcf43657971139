"""Every config in configs/ is valid, says its own command, and fits its tokenizer; nothing is allocated."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from vishwamai import experiment as experiments
from vishwamai import families
from vishwamai.config import ConfigError
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
    tokenizer = VishwamAITokenizer.from_pretrained(ROOT / experiment.tokenizer)
    assert tokenizer.vocab_size == family.text_config(experiment.model).vocab_size
    assert "dry run: nothing was allocated" in dry_run(experiment, family)


@pytest.mark.parametrize("name", ["parsit_tiny", "vishwamai_tiny"])
def test_a_tiny_model_uses_only_what_transformers_can_express(name):
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
