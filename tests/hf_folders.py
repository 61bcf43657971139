"""Hugging Face folders with random weights, written without PyTorch."""

import json
from pathlib import Path

import numpy as np
import yaml
from flax import nnx

from vishwamai import families
from vishwamai.checkpoint import save_parameters
from vishwamai.convert.parameters import abstract_parameters, exported_tensors, state_path
from vishwamai.convert.weights import SHARD_BYTES, ShardWriter

TEXT = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
)  # fmt: skip
VISION = dict(
    hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4,
    vision_use_head=True,
)  # fmt: skip
SPARSE = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, aux_loss_scope="model")
GEMMA = dict(
    zero_centered_norms=True, sandwich_norms=True, scale_embeddings=True, hidden_act="gelu_pytorch_tanh",
    sliding_window=5, layer_types=["sliding_attention", "full_attention"], num_hidden_layers=5,
)  # fmt: skip
MODELS = {
    "gemma2": TEXT | GEMMA | dict(qk_norm=False, attn_logit_softcapping=9.0),
    "gemma3": TEXT | GEMMA | dict(rope_local_base_freq=5000.0),
    "llama": TEXT | dict(qk_norm=False, attention_bias="all", mlp_bias=True),
    "mistral": TEXT | dict(qk_norm=False, sliding_window=5),
    "mixtral": TEXT | dict(qk_norm=False, intermediate_size=12, mixture=SPARSE),
    "qwen2": TEXT | dict(qk_norm=False, attention_bias="qkv", tie_word_embeddings=True),
    "qwen3": TEXT,
    "qwen3_moe": TEXT | dict(num_hidden_layers=4, mixture=SPARSE | dict(mlp_only_layers=[0])),
    "siglip": VISION,
    "parsit": dict(text=TEXT, vision=VISION, image_token_id=60, vision_feature_layer=-2),
}


def model_config(family: str, **changes):
    return families.get(family).model_config(**{**MODELS[family], **changes})


def random_parameters(family: str, config, dtype="float32", seed=0, scale=1.0) -> nnx.State:
    """A state with every number drawn anew."""
    random = np.random.default_rng(seed)
    flat = nnx.to_flat_state(abstract_parameters(families.get(family).build, config))
    return nnx.from_flat_state(
        [(path, v.replace(random.normal(0, scale, v.get_value().shape).astype(dtype))) for path, v in flat]
    )


def tensors_of(family: str, config, parameters: nnx.State):
    """Their name -> array, in today's spelling."""
    flat = dict(nnx.to_flat_state(parameters))

    def fetch(ours, layer):
        array = np.asarray(flat[state_path(ours)].get_value())
        return array if layer is None else array[layer]

    return exported_tensors("test", families.get(family).layout.rows(config), fetch)


def make_run(folder: Path, family: str, config=None, **options) -> nnx.State:
    """A run's folder as training leaves it, as far as conversion looks. Returns its parameters."""
    config = config or model_config(family)
    parameters = random_parameters(family, config, **options)
    folder.mkdir(exist_ok=True)
    content = {"family": family, "model": config.model_dump(mode="json")}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    save_parameters(folder, parameters, step=7)
    return parameters


def write_folder(
    folder: Path, family: str, config=None, dtype="bfloat16", naming="today", extra=None, leave=(), shard=SHARD_BYTES
) -> dict[str, np.ndarray]:
    """Writes a checkpoint as published; `extra` tensors added, those in `leave` left out. Returns what it holds."""
    layout = families.get(family).layout
    config = config or model_config(family)
    tensors = tensors_of(family, config, random_parameters(family, config, dtype))
    held = {layout.naming(naming).spell(name): tensor for name, tensor in tensors.items()} | (extra or {})
    held = {name: tensor for name, tensor in held.items() if name not in leave}
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, list(held), shard)
    for name, tensor in held.items():
        writer.write(name, tensor)
    writer.close()
    content = layout.write_config(config) | {"dtype": dtype, "transformers_version": "5.0.0"}
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    return held


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the safetensors library."""
    from safetensors import safe_open

    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            held |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return held


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Same names, types and bits."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
