"""Qwen3 (`Qwen3ForCausalLM`): its names at Hugging Face, and the family that the rest of the code looks up."""

from collections.abc import Mapping
from typing import Any

from vishwamai.convert.hf_config import Reader, build
from vishwamai.convert.layout import Layout, Row, inside, linear, norm
from vishwamai.data.text import TextData, batch_source
from vishwamai.families import Family
from vishwamai.models.config import TextConfig
from vishwamai.models.transformer import Transformer


def rows(config: TextConfig) -> list[Row]:
    """The name table."""
    layer = norm("input_layernorm", "input_layernorm") + norm("post_attention_layernorm", "post_attention_layernorm")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer += linear(f"self_attn.{name}", f"self_attn.{name}")
    for name in ("q_norm", "k_norm"):
        layer += norm(f"self_attn.{name}", f"self_attn.{name}")
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer += linear(f"mlp.{name}", f"mlp.{name}")
    return [
        Row(("embed_tokens.embedding",), "model.embed_tokens.weight"),
        *inside(layer, "layers.{layer}.", "model.layers.{layer}.", layers=config.num_hidden_layers),
        *norm("norm", "model.norm"),
        *([] if config.tie_word_embeddings else linear("lm_head", "lm_head")),
    ]


def read_config(source: Mapping[str, Any], where: str = "config.json") -> TextConfig:
    """A TextConfig from a `qwen3` config.json. Raises ConfigError for what the decoder doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["qwen3"], "only Qwen3 text models are known")
    reader.insist("hidden_act", ["silu"], "the feed-forward block is SwiGLU")
    reader.insist("attention_bias", [False], "attention has no biases")
    reader.insist("attention_dropout", [0], "there is no dropout")
    reader.insist("use_sliding_window", [False], "attention has no window")
    for kind in reader.get("layer_types", []):
        Reader({"layer_types": kind}, where).insist("layer_types", ["full_attention"], "attention has no window")
    heads = reader.get("num_attention_heads", 32)
    return build(
        TextConfig,
        where,
        vocab_size=reader.get("vocab_size", 151936),
        hidden_size=reader.get("hidden_size", 4096),
        intermediate_size=reader.get("intermediate_size", 22016),
        num_hidden_layers=reader.get("num_hidden_layers", 32),
        num_attention_heads=heads,
        # An explicit null means as many as query heads, an absent key Transformers' default.
        num_key_value_heads=reader.get("num_key_value_heads", heads if "num_key_value_heads" in source else 32),
        head_dim=reader.get("head_dim", 128),
        max_position_embeddings=reader.get("max_position_embeddings", 32768),
        rope_theta=_rope_theta(reader),
        rms_norm_eps=reader.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.get("tie_word_embeddings", False),
        initializer_range=reader.get("initializer_range", 0.02),
    )


def _rope_theta(reader: Reader) -> float:
    """The rotary base from `rope_parameters`, or from `rope_theta` beside `rope_scaling` in older files."""
    why = "the rotary embedding is the plain one"
    theta = reader.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        if reader.get(key, None):
            rope = reader.inner(key)
            rope.insist("rope_type", ["default"], why)
            rope.insist("type", ["default"], why)
            rope.insist("partial_rotary_factor", [1], why)
            theta = rope.get("rope_theta", theta)
    reader.insist("partial_rotary_factor", [1], why)
    return theta


def write_config(config: TextConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `Qwen3ForCausalLM`."""
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings rms_norm_eps tie_word_embeddings initializer_range"
    )
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{key: getattr(config, key) for key in same.split()},
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
    }


def duplicates(config: TextConfig) -> dict[str, str]:
    """Some published files (Qwen3-0.6B) hold the tied output matrix a second time."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


FAMILY = Family(
    name="qwen3",
    model_config=TextConfig,
    data_config=TextData,
    build=Transformer,
    text_config=lambda config: config,
    batch_source=batch_source,
    layout=Layout(
        architectures=("Qwen3ForCausalLM",),
        rows=rows,
        read_config=read_config,
        write_config=write_config,
        left_out=("*.rotary_emb.inv_freq",),
        duplicates=duplicates,
    ),
)
