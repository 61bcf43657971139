"""Gemma 2 (`Gemma2ForCausalLM`): local and global layers in turn, soft-caps, sandwich norms, GeGLU."""

from collections.abc import Mapping
from typing import Any

from vishwamai.convert.decoder import ANY, decoder_family, read_decoder, windows, write_decoder, write_layer_types
from vishwamai.convert.hf_config import Reader
from vishwamai.models.config import AttentionBias, LayerType, TextConfig

DEFAULTS = dict(
    vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True,
    initializer_range=0.02, hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
# What all of Gemma's decoders have in common: fields of TextConfig, and the values that a class of theirs can have.
GEMMA = dict(zero_centered_norms=True, sandwich_norms=True, scale_embeddings=True)
COMPUTES = {field: (value,) for field, value in GEMMA.items()} | dict(
    attention_bias=(AttentionBias.NONE, AttentionBias.ALL),
    sliding_window=ANY,
    layer_types=ANY,
    query_pre_attn_scalar=ANY,
    final_logit_softcapping=ANY,
)


def read_config(source: Mapping[str, Any], where: str = "config.json") -> TextConfig:
    """A TextConfig from a `gemma2` config.json. Raises ConfigError for what the decoder doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["gemma2"], "this is no Gemma 2 text model")
    layers = reader.get("num_hidden_layers", DEFAULTS["num_hidden_layers"])
    by_number = [LayerType.FULL if i % 2 else LayerType.SLIDING for i in range(layers)]
    window = windows(reader, reader.get("layer_types", by_number), reader.get("sliding_window", 4096))
    caps = {  # a null is none, an absent key Transformers' default
        key: reader.get(key, None if key in source else default)
        for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    }
    return read_decoder(reader, DEFAULTS, qk_norm=False, **read_gemma(reader, DEFAULTS), **caps, **window)


def read_gemma(reader: Reader, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a TextConfig that all of Gemma's decoders read alike."""
    reader.insist("use_bidirectional_attention", [False], "attention is causal")
    scalar = reader.get("query_pre_attn_scalar", 256)
    bias = AttentionBias.ALL if reader.get("attention_bias", False) else AttentionBias.NONE
    own = scalar != reader.get("head_dim", defaults["head_dim"])
    return GEMMA | {"attention_bias": bias, "query_pre_attn_scalar": scalar if own else None}


def write_gemma(config: TextConfig, architecture: str, model_type: str, **own: Any) -> dict[str, Any]:
    """A config.json with the keys that all of Gemma's decoders have."""
    found = write_decoder(
        config,
        architecture,
        model_type,
        attention_bias=config.attention_bias is AttentionBias.ALL,
        hidden_activation=config.hidden_act.value,
        sliding_window=config.sliding_window,
        layer_types=write_layer_types(config),
        query_pre_attn_scalar=config.query_pre_attn_scalar or config.head_dim,
        attn_logit_softcapping=config.attn_logit_softcapping,
        final_logit_softcapping=config.final_logit_softcapping,
        **own,
    )
    del found["hidden_act"]
    return found


def write_config(config: TextConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `Gemma2ForCausalLM`."""
    return write_gemma(config, "Gemma2ForCausalLM", "gemma2")


FAMILY = decoder_family(
    "gemma2", "Gemma2ForCausalLM", read_config, write_config, COMPUTES | {"attn_logit_softcapping": ANY}
)
