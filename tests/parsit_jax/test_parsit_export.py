"""A run of our own config as Transformers opens it: model, tokenizer and processor."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf_folders import VISION, make_run, model_config
from parity import assert_close, torch, transformers
from PIL import Image

from parsit_jax import Parsit
from parsit_jax.documents.patches import preprocess
from vishwamai import VishwamAI
from vishwamai.convert.to_hf import to_hf
from vishwamai.templates import load_template
from vishwamai.tiny_tokenizer import ALPHABET, PIECES, build_tiny_tokenizer

IMAGE = "<|image_pad|>"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    build_tiny_tokenizer(ALPHABET, PIECES, load_template("qwen3"), folder / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    vision = {**VISION, "positions": "factorised", "vision_use_head": False}
    text = dict(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    make_run(folder, "parsit", model_config("parsit", vision=vision, text=text, image_token_id=image), scale=0.3)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    to_hf(run, tmp_path_factory.mktemp("export") / "hf")
    return next(tmp_path_factory.getbasetemp().glob("export*/hf"))


def test_the_model_computes_the_same(run, exported):
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(exported).eval()
    assert isinstance(theirs, transformers.LlavaForConditionalGeneration) and theirs.dtype == torch.float32
    ours = Parsit.from_pretrained(run)
    ids = np.full((1, 24), 40)
    ids[0, 3:19] = ours.config.image_token_id
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    assert ours.config.vision.positions == "factorised"  # their table is the sum of ours
    expected = theirs(torch.tensor(ids), torch.tensor(pixels)).logits
    assert_close(ours(ids, pixels), expected)
    back = Parsit.from_pretrained(exported)
    assert back.config.vision.positions == "table" and back.experiment is None
    assert_close(back(ids, pixels), expected)


def test_the_tokenizer_and_the_ends_of_an_answer(run, exported):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = Parsit.from_pretrained(exported).tokenizer
    text = "<|im_start|>user\nWhat is the total? £3<|im_end|>\n"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    generation = transformers.GenerationConfig.from_pretrained(exported)
    assert generation.eos_token_id == list(ours.eos_token_ids) and generation.pad_token_id == ours.pad_token_id


def test_the_processor_prepares_a_page_as_we_do(exported):
    processor = transformers.AutoProcessor.from_pretrained(exported)
    assert type(processor).__name__ == "LlavaProcessor"
    page = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 21, 3), np.uint8))
    inputs = processor(text=f"<|vision_start|>{IMAGE}<|vision_end|>What?", images=page, return_tensors="pt")
    image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert int((inputs["input_ids"] == image_token).sum()) == 16
    ours = preprocess(page, 16, 16).astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), ours, atol=2 / 255 + 1e-6)
    model = transformers.AutoModelForImageTextToText.from_pretrained(exported).eval()
    logits = model(**{name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")}).logits
    got = Parsit.from_pretrained(exported)(*(inputs[name].numpy() for name in ("input_ids", "pixel_values")))
    assert_close(got, logits)


def test_no_file_of_ours_is_left_in_the_export(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((exported / "config.json").read_text())
    assert config["vision_feature_select_strategy"] == "full" and config["vision_feature_layer"] == -2


def test_a_text_run_opens_as_qwen3(tmp_path):
    make_run(tmp_path / "run", "qwen3", model_config("qwen3", rope_theta=5e5, rms_norm_eps=1e-5), scale=0.3)
    build_tiny_tokenizer(ALPHABET, PIECES, load_template("qwen3"), tmp_path / "run" / "tokenizer")
    to_hf(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = np.arange(40).reshape(2, 20)
    assert_close(VishwamAI.from_pretrained(tmp_path / "run")(ids), theirs(torch.tensor(ids)).logits)
