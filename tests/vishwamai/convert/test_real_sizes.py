"""The name tables at the sizes that are published: names and shapes against Transformers, nothing allocated."""

import numpy as np
import pytest
from parity import as_published, torch, transformers

from vishwamai import families
from vishwamai.convert.parameters import abstract_parameters, exported_tensors, state_path

QWEN3 = dict(
    vocab_size=151936, head_dim=128, num_key_value_heads=8, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
)
QWEN3_600M = transformers.Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    tie_word_embeddings=True,
    **QWEN3,
)
QWEN3_8B = transformers.Qwen3Config(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, **QWEN3
)
SO400M = transformers.SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
LLAVA = transformers.LlavaConfig(
    text_config=QWEN3_600M,
    vision_config=SO400M,
    image_token_index=151655,
    vision_feature_select_strategy="full",
    vision_feature_layer=-2,
)
QWEN3_30B = transformers.Qwen3MoeConfig(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, **(QWEN3 | dict(num_key_value_heads=4)),
)  # fmt: skip
MIXTRAL_8X7B = transformers.MixtralConfig(num_key_value_heads=8)
GEMMA3_1B = transformers.Gemma3TextConfig(
    vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
    num_key_value_heads=1, sliding_window=512,
)  # fmt: skip
# class, config, parameters in all
PUBLISHED = {
    "Qwen3-0.6B": (transformers.Qwen3ForCausalLM, QWEN3_600M, 596_049_920),
    "Qwen3-8B": (transformers.Qwen3ForCausalLM, QWEN3_8B, 8_190_735_360),
    "Qwen3-30B-A3B": (transformers.Qwen3MoeForCausalLM, QWEN3_30B, 30_532_122_624),
    "Mixtral-8x7B": (transformers.MixtralForCausalLM, MIXTRAL_8X7B, 46_702_792_704),
    "gemma-3-1b": (transformers.Gemma3ForCausalLM, GEMMA3_1B, 999_885_952),
    "siglip-so400m-patch14-384": (transformers.SiglipVisionModel, SO400M, 428_225_600),
    "Llava with both": (transformers.LlavaForConditionalGeneration, LLAVA, 1_026_505_792),
}


@pytest.mark.parametrize("model, config, total", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_names_and_shapes(model, config, total):
    family = families.for_architecture(model.__name__)
    layout = family.layout
    ours = layout.read_config({**config.to_dict(), "architectures": [model.__name__]})
    with torch.device("meta"):
        theirs = dict(as_published(model(config), lambda parameter: parameter))
    abstract = abstract_parameters(family.build, ours)

    def fetch(path, layer):
        shape = _at(abstract, state_path(path)).get_value().shape
        return np.broadcast_to(np.int8(0), shape if layer is None else shape[1:])  # one byte, whatever the shape

    spell = next(naming for naming in reversed(layout.namings) if naming.name in ("today", "nested")).spell
    shapes = {spell(name): tensor.shape for name, tensor in exported_tensors("", layout.rows(ours), fetch).items()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in theirs.items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == total
    written = type(config).from_dict(layout.write_config(ours))
    assert layout.read_config(written.to_dict()) == ours


def _at(state, path):
    for part in path:
        state = state[part]
    return state
