"""A small model, the small tokenizer, and experiments over both."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from parsit_jax.data.config import ParsitData
from parsit_jax.models.config import ParsitConfig, VisionConfig
from vishwamai.chat import IMAGE_TOKEN
from vishwamai.models.config import TextConfig
from vishwamai.tokenizer import VishwamAITokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def tokenizer():
    return VishwamAITokenizer.from_pretrained(ROOT / "configs" / "tokenizers" / "parsit_tiny")


@pytest.fixture
def experiment(tokenizer, tmp_path, monkeypatch):
    """data=... (and seed, batch_size, model's fields) -> what `batch_source` needs of an experiment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(
        *datasets, seed=0, batch_size=4, max_length=400, image_token_id=None, vocab_size=None, pooling="none", **data
    ):
        text = TextConfig(
            vocab_size=vocab_size or tokenizer.vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        )
        vision = VisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=128,
            patch_size=16,
        )
        image = tokenizer.token_to_id(IMAGE_TOKEN) if image_token_id is None else image_token_id
        return SimpleNamespace(
            model=ParsitConfig(text=text, vision=vision, image_token_id=image, pooling=pooling),
            data=ParsitData(max_length=max_length, datasets=list(datasets), **data),
            seed=seed,
            training=SimpleNamespace(batch_size=batch_size),
        )

    return make
