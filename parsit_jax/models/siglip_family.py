"""SigLIP's vision tower (`SiglipVisionModel`): its names at Hugging Face, and the family. A part, not trained alone."""

from collections.abc import Mapping
from typing import Any

from parsit_jax.models.config import PositionTable, VisionConfig
from parsit_jax.models.siglip import SiglipVision
from vishwamai.config import Config, ConfigError
from vishwamai.convert.hf_config import Reader, build
from vishwamai.convert.layout import (
    SAME,
    TRANSPOSE,
    Layout,
    Naming,
    Row,
    Transform,
    convolution,
    inside,
    linear,
    norm,
    outer_sum,
)
from vishwamai.families import Family


def rows(config: VisionConfig, run_layers: int | None = None) -> list[Row]:
    """The name table; layers from `run_layers` on are carried in a stack of their own."""
    run = config.num_hidden_layers if run_layers is None else run_layers
    layer = norm("layer_norm1", "layer_norm1", bias=True) + norm("layer_norm2", "layer_norm2", bias=True)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    ):
        layer += linear(name, name, bias=True)
    table = [
        Row(
            ("embeddings.patch_embedding.kernel",),
            "embeddings.patch_embedding.weight",
            convolution(config.num_channels, config.patch_size),
        ),
        Row(("embeddings.patch_embedding.bias",), "embeddings.patch_embedding.bias"),
        _positions(config),
        *inside(layer, "layers.{layer}.", "encoder.layers.{layer}.", layers=range(run)),
        *norm("post_layernorm", "post_layernorm", bias=True),
    ]
    if unused := config.num_hidden_layers - run:
        table += inside(layer, "unused_layers.{layer}.", "encoder.layers.{layer}.", layers=range(run, run + unused))
    return table + (_head() if config.vision_use_head else [])


def _positions(config: VisionConfig) -> Row:
    theirs = "embeddings.position_embedding.weight"
    if config.positions is PositionTable.FACTORISED:
        parts = ("embeddings.row_embedding.embedding", "embeddings.column_embedding.embedding")
        return Row(parts, theirs, Transform(outer_sum, None))
    return Row(("embeddings.position_embedding.embedding",), theirs)


def _head() -> list[Row]:
    return [
        Row(("head.probe",), "head.probe", SAME),
        Row(("head.in_proj.kernel",), "head.attention.in_proj_weight", TRANSPOSE),
        Row(("head.in_proj.bias",), "head.attention.in_proj_bias"),
        *linear("head.out_proj", "head.attention.out_proj", bias=True),
        *norm("head.layernorm", "head.layernorm", bias=True),
        *linear("head.mlp.fc1", "head.mlp.fc1", bias=True),
        *linear("head.mlp.fc2", "head.mlp.fc2", bias=True),
    ]


def read_config(source: Mapping[str, Any], where: str = "config.json") -> VisionConfig:
    """A VisionConfig from a `siglip_vision_model` config.json, or from the vision part of a full `siglip` one."""
    reader = Reader(source, where)
    if source.get("model_type") == "siglip":
        reader = reader.inner("vision_config")
    reader.insist("model_type", ["siglip_vision_model"], "the vision tower is SigLIP, or fixed-resolution SigLIP-2")
    reader.insist("hidden_act", ["gelu_pytorch_tanh"], "the feed-forward block is GELU's tanh form")
    reader.insist("attention_dropout", [0], "there is no dropout")
    return build(
        VisionConfig,
        reader.where,
        hidden_size=reader.get("hidden_size", 768),
        intermediate_size=reader.get("intermediate_size", 3072),
        num_hidden_layers=reader.get("num_hidden_layers", 12),
        num_attention_heads=reader.get("num_attention_heads", 12),
        image_size=_side(reader, "image_size", 224),
        patch_size=_side(reader, "patch_size", 16),
        num_channels=reader.get("num_channels", 3),
        layer_norm_eps=reader.get("layer_norm_eps", 1e-6),
        vision_use_head=reader.get("vision_use_head", True),
    )


def _side(reader: Reader, key: str, default: int) -> int:
    """A side in pixels; newer files may hold (height, width)."""
    value = reader.get(key, default)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ConfigError(f"{reader.where}: {key}={value} is not square; the position table stands for a square")
    return sides.pop()


def write_config(config: VisionConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `SiglipVisionModel`."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **config.model_dump(mode="json", exclude={"positions"}),
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
    }


def batch_source(experiment, tokenizer):
    raise ConfigError("family: siglip is a part and is not trained alone; train a parsit with it as vision_tower")


FAMILY = Family(
    name="siglip",
    model_config=VisionConfig,
    data_config=Config,
    build=SiglipVision,
    text_config=lambda config: None,
    batch_source=batch_source,
    layout=Layout(
        architectures=("SiglipVisionModel", "SiglipModel"),
        rows=rows,
        read_config=read_config,
        write_config=write_config,
        namings=(Naming("today"), Naming("vision_model", (("", "vision_model."),))),
        left_out=("text_model.*", "logit_scale", "logit_bias", "*embeddings.position_ids"),
    ),
)
