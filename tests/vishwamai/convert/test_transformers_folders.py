"""Folders that Transformers wrote, there and back: the same tensors, types and files."""

import json
from functools import partial

import pytest
from hf_folders import assert_same, read_folder
from parity import DECODERS, llava_config, randomised, saved, stretched, text_config, torch, transformers, vision_config

from vishwamai import families
from vishwamai.convert.from_hf import from_hf
from vishwamai.convert.to_hf import to_hf
from vishwamai.convert.weights import INDEX

MODELS = {
    **{name: (model, partial(text_config, name, tie_word_embeddings=False)) for name, (_, model) in DECODERS.items()},
    "qwen3 tied": (transformers.Qwen3ForCausalLM, text_config),
    "llama with biases": (
        transformers.LlamaForCausalLM,
        partial(text_config, "llama", attention_bias=True, mlp_bias=True, **stretched("yarn")),
    ),
    "siglip": (transformers.SiglipVisionModel, vision_config),
    "llava": (transformers.LlavaForConditionalGeneration, lambda: llava_config(vision_feature_layer=-2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind, config", MODELS.values(), ids=MODELS.keys())
def test_there_and_back(tmp_path, kind, config, dtype):
    model = randomised(kind(config())).to(dtype)
    source = saved(model, tmp_path / "source", max_shard_size="50KB")
    assert (source / INDEX).is_file()
    from_hf(source, tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "back", shard_bytes=50_000)
    assert_same(read_folder(tmp_path / "back"), read_folder(source))
    for path in source.glob("*.json"):
        if path.name != INDEX:
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (source, tmp_path / "back"))
    assert sorted(after["weight_map"]) == sorted(before["weight_map"])
    # And Transformers opens what we wrote.
    again = kind.from_pretrained(tmp_path / "back", dtype=dtype)
    for (name, theirs), ours in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(theirs, ours), name


@pytest.mark.parametrize("name", DECODERS)
def test_keys_left_out_mean_what_they_mean_there(name):
    config = DECODERS[name][0]()
    layout = families.get(name).layout
    assert layout.read_config({"model_type": config.model_type}) == layout.read_config(config.to_dict())
