"""Qwen3 (`Qwen3ForCausalLM`): heads are normalised, biases are rare."""

from collections.abc import Mapping
from typing import Any

from vishwamai.convert.decoder import ANY, decoder_family, read_decoder, read_window, write_decoder, write_window
from vishwamai.convert.hf_config import Reader
from vishwamai.models.config import AttentionBias, TextConfig

DEFAULTS = dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False,
    initializer_range=0.02,
)  # fmt: skip


def read_config(source: Mapping[str, Any], where: str = "config.json") -> TextConfig:
    """A TextConfig from a `qwen3` config.json. Raises ConfigError for what the decoder doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["qwen3"], "this is no Qwen3 text model")
    bias = AttentionBias.ALL if reader.get("attention_bias", False) else AttentionBias.NONE
    window = read_window(reader, reader.get("num_hidden_layers", DEFAULTS["num_hidden_layers"]))
    return read_decoder(reader, DEFAULTS, attention_bias=bias, **window)


def write_config(config: TextConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `Qwen3ForCausalLM`."""
    bias = config.attention_bias is AttentionBias.ALL
    return write_decoder(config, "Qwen3ForCausalLM", "qwen3", attention_bias=bias, **write_window(config))


FAMILY = decoder_family(
    "qwen3",
    "Qwen3ForCausalLM",
    read_config,
    write_config,
    dict(
        qk_norm=(True,),
        attention_bias=(AttentionBias.NONE, AttentionBias.ALL),
        sliding_window=ANY,
        layer_types=ANY,
    ),
)
