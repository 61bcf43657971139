"""A tiny model with random weights and a tokenizer."""

import shutil
from pathlib import Path

import pytest
from hf_folders import write_folder

from vishwamai import VishwamAI
from vishwamai.models.config import TextConfig

TOKENIZER = Path(__file__).parents[3] / "configs" / "tokenizers" / "parsit_tiny"
CONFIG = TextConfig(
    vocab_size=389, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=48, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "model"
    write_folder(folder, "qwen3", CONFIG, dtype="float32")
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def model(text_folder) -> VishwamAI:
    return VishwamAI.from_pretrained(text_folder)


@pytest.fixture
def uniform(model) -> VishwamAI:
    """Finds every token as likely as any other."""
    kernel = model.parameters["lm_head"]["kernel"]
    model.parameters["lm_head"]["kernel"] = kernel.replace(kernel.get_value() * 0)
    return model
