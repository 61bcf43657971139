"""Parsit at Hugging Face: `LlavaForConditionalGeneration` with SigLIP and Qwen3 inside. And the family."""

from collections.abc import Mapping
from typing import Any

from parsit_jax.data.config import ParsitData
from parsit_jax.models import siglip_family
from parsit_jax.models.config import ImageMask, ParsitConfig, Pooling
from parsit_jax.models.parsit import ParsitModel
from vishwamai.config import ConfigError
from vishwamai.convert import decoder
from vishwamai.convert.hf_config import Reader, build
from vishwamai.convert.layout import Layout, Naming, Row, inside, linear
from vishwamai.families import Family
from vishwamai.models import qwen3
from vishwamai.tokenizer import VishwamAITokenizer


def rows(config: ParsitConfig) -> list[Row]:
    """The name table: the parts' own, each behind its prefix."""
    numbers = range(1, config.projector_layers + 1)
    projector = [row for i in numbers for row in linear(f"linear_{i}", f"linear_{i}", bias=True)]
    vision = siglip_family.rows(config.vision, config.feature_layers)
    return [
        *inside(vision, "vision_tower.", "vision_tower."),
        *inside(projector, "multi_modal_projector.", "multi_modal_projector."),
        *inside(decoder.rows(config.text), "language_model.", "language_model."),
    ]


def read_config(source: Mapping[str, Any], where: str = "config.json") -> ParsitConfig:
    """A ParsitConfig from a `llava` config.json. Raises ConfigError for what Parsit doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["llava"], "Parsit is read from LLaVA's layout")
    reader.insist("projector_hidden_act", ["gelu"], "the projector is mlp2x_gelu")
    reader.insist("multimodal_projector_bias", [True], "the projector has biases")
    if reader.get("vision_feature_select_strategy", "default") != "full":
        raise ConfigError(
            f"{where}: vision_feature_select_strategy is not 'full': Transformers would drop the first patch of a "
            "SigLIP tower, which has no class token"
        )
    layer = reader.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ConfigError(f"{where}: vision_feature_layer={layer} joins several layers, expected one number")
    vision = siglip_family.read_config(reader.inner("vision_config").section, f"{where}: vision_config")
    text = qwen3.read_config(reader.inner("text_config").section, f"{where}: text_config")
    # Either place ties the output matrix in Transformers.
    tied = text.tie_word_embeddings or reader.get("tie_word_embeddings", False)
    return build(
        ParsitConfig,
        where,
        text=text.model_copy(update={"tie_word_embeddings": tied}),
        vision=vision,
        # Counted from the front, hidden state 0 is the embeddings' and the last one is number `depth`.
        vision_feature_layer=layer if layer < 0 else layer - vision.num_hidden_layers - 1,
        image_token_id=reader.get("image_token_index", source.get("image_token_id", 32000)),
    )


def write_config(config: ParsitConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `LlavaForConditionalGeneration`."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.vision.grid**2,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "full",
        "text_config": _part(qwen3.write_config(config.text)),
        "vision_config": _part(siglip_family.write_config(config.vision)),
    }


def _part(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "architectures"}


def unsupported(config: ParsitConfig, data: ParsitData | None = None) -> list[str]:
    """What a config asks for that `LlavaForConditionalGeneration` does not compute."""
    found = [line.replace("model.", "model.text.", 1) for line in qwen3.FAMILY.layout.unsupported(config.text, None)]
    if config.pooling is not Pooling.NONE:
        found.append(f"model.pooling={config.pooling.value}: image features are not pooled there")
    if config.projector != "mlp2x_gelu":
        found.append(f"model.projector={config.projector}: its projector is mlp2x_gelu")
    if config.image_mask is not ImageMask.CAUSAL:
        found.append(f"model.image_mask={config.image_mask.value}: its image tokens see only what stands before them")
    side = config.vision.image_size
    if data and data.image_size not in (None, (side, side)):
        found.append(f"data.image_size={list(data.image_size)}: its positions are those of {side} x {side} pixels")
    return found


def companions(config: ParsitConfig, tokenizer: VishwamAITokenizer) -> dict[str, dict[str, Any]]:
    """What `AutoProcessor` needs to prepare pages as the model was trained on them."""
    image_processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.vision.image_size, "width": config.vision.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * config.vision.num_channels,
        "image_std": [0.5] * config.vision.num_channels,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
        "image_token": tokenizer.decode([config.image_token_id]),
    }
    return {
        "preprocessor_config.json": image_processor | {"processor_class": "LlavaProcessor"},
        "processor_config.json": processor,
    }


def duplicates(config: ParsitConfig) -> dict[str, str]:
    """A tied output matrix that a file holds a second time."""
    return {f"language_model.{a}": f"language_model.{b}" for a, b in decoder.duplicates(config.text).items()}


def batch_source(experiment, tokenizer):
    """Global batches of packed conversations with their images by step number."""
    from parsit_jax.data.batches import batch_source as source  # the data code is only needed to train

    return source(experiment, tokenizer)


_NESTED = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)

FAMILY = Family(
    name="parsit",
    model_config=ParsitConfig,
    data_config=ParsitData,
    build=ParsitModel,
    text_config=lambda config: config.text,
    batch_source=batch_source,
    layout=Layout(
        architectures=("LlavaForConditionalGeneration",),
        rows=rows,
        read_config=read_config,
        write_config=write_config,
        namings=(
            Naming("today"),
            Naming("vision_model", (("vision_tower.", "vision_tower.vision_model."),)),
            Naming("nested", (*_NESTED, ("vision_tower.", "model.vision_tower."))),
            Naming("nested_vision_model", (*_NESTED, ("vision_tower.", "model.vision_tower.vision_model."))),
        ),
        left_out=("*embeddings.position_ids", "*.rotary_emb.inv_freq"),
        duplicates=duplicates,
        parts={"vision_tower": "siglip", "language_model": "qwen3"},
        unsupported=unsupported,
        companions=companions,
    ),
)
