"""Llama 2 and 3 (`LlamaForCausalLM`): no q/k norm, no window."""

from collections.abc import Mapping
from typing import Any

from vishwamai.convert.decoder import ANY, decoder_family, read_decoder, write_decoder
from vishwamai.convert.hf_config import Reader
from vishwamai.models.config import AttentionBias, TextConfig

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.02,
)  # fmt: skip


def read_config(source: Mapping[str, Any], where: str = "config.json") -> TextConfig:
    """A TextConfig from a `llama` config.json. Raises ConfigError for what the decoder doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["llama"], "this is no Llama text model")
    bias = AttentionBias.ALL if reader.get("attention_bias", False) else AttentionBias.NONE
    return read_decoder(reader, DEFAULTS, qk_norm=False, attention_bias=bias, mlp_bias=reader.get("mlp_bias", False))


def write_config(config: TextConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `LlamaForCausalLM`."""
    own = {"attention_bias": config.attention_bias is AttentionBias.ALL, "mlp_bias": config.mlp_bias}
    return write_decoder(config, "LlamaForCausalLM", "llama", **own)


FAMILY = decoder_family(
    "llama",
    "LlamaForCausalLM",
    read_config,
    write_config,
    dict(attention_bias=(AttentionBias.NONE, AttentionBias.ALL), mlp_bias=ANY),
)
