"""Mistral (`MistralForCausalLM`): as Llama, with a window in the first versions."""

from collections.abc import Mapping
from typing import Any

from vishwamai.convert.decoder import ANY, decoder_family, read_decoder, write_decoder
from vishwamai.convert.hf_config import Reader
from vishwamai.models.config import TextConfig

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=False,
    initializer_range=0.02,
)  # fmt: skip


def read_config(source: Mapping[str, Any], where: str = "config.json") -> TextConfig:
    """A TextConfig from a `mistral` config.json. Raises ConfigError for what the decoder doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["mistral"], "this is no Mistral text model")
    # A null is no window, an absent key Transformers' default.
    window = reader.get("sliding_window", None if "sliding_window" in source else 4096)
    return read_decoder(reader, DEFAULTS, qk_norm=False, sliding_window=window)


def write_config(config: TextConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `MistralForCausalLM`."""
    return write_decoder(config, "MistralForCausalLM", "mistral", sliding_window=config.sliding_window)


FAMILY = decoder_family(
    "mistral",
    "MistralForCausalLM",
    read_config,
    write_config,
    dict(sliding_window=ANY),
)
