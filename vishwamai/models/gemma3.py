"""Gemma 3's text model (`Gemma3ForCausalLM`): local and global layers, each with its own rotary base, sandwich norms."""

from collections.abc import Mapping
from typing import Any

from vishwamai.convert.decoder import ANY, decoder_family, read_decoder, windows
from vishwamai.convert.hf_config import Reader
from vishwamai.convert.rope_keys import read_rope, read_rope_section, write_rope
from vishwamai.models.config import LayerType, RopeScaling, TextConfig
from vishwamai.models.gemma2 import COMPUTES, read_gemma, write_gemma

DEFAULTS = dict(
    vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=True,
    initializer_range=0.02, hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
GLOBAL_THETA, LOCAL_THETA, EVERY, WINDOW = 1_000_000.0, 10_000.0, 6, 4096


def read_config(source: Mapping[str, Any], where: str = "config.json") -> TextConfig:
    """A TextConfig from a `gemma3_text` config.json. Raises ConfigError for what the decoder doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["gemma3_text"], "this is no Gemma 3 text model")
    reader.insist("attn_logit_softcapping", [], "Transformers' Gemma 3 leaves it out, so what is meant is unclear")
    layers, every = reader.get("num_hidden_layers", DEFAULTS["num_hidden_layers"]), EVERY
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        every = reader.get(key, every)
    by_number = [LayerType.FULL if (i + 1) % every == 0 else LayerType.SLIDING for i in range(layers)]
    window = windows(reader, reader.get("layer_types", by_number), reader.get("sliding_window", WINDOW))
    theta, local, scaling = _read_bases(reader)
    return read_decoder(
        reader,
        DEFAULTS,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_base_freq=local,
        final_logit_softcapping=reader.get("final_logit_softcapping", None),
        **read_gemma(reader, DEFAULTS),
        **window,
    )


def _read_bases(reader: Reader) -> tuple[float, float, RopeScaling | None]:
    """(global base, local base, scaling of the global one)."""
    longest = reader.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    local = reader.get("rope_local_base_freq", LOCAL_THETA)
    sections = reader.get("rope_parameters", {})
    if LayerType.FULL not in sections and LayerType.SLIDING not in sections:
        theta, scaling = read_rope(reader, longest, GLOBAL_THETA)
        return theta, local, scaling
    sections = reader.inner("rope_parameters")
    theta, scaling = GLOBAL_THETA, None
    if sections.get(LayerType.FULL, None):
        theta, scaling = read_rope_section(sections.inner(LayerType.FULL), longest, theta)
    if sections.get(LayerType.SLIDING, None):
        own = sections.inner(LayerType.SLIDING)
        own.insist("rope_type", ["default"], "the rotary embedding of local layers is not stretched")
        local = own.get("rope_theta", local)
    return theta, local, scaling


def write_config(config: TextConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `Gemma3ForCausalLM`."""
    sections = {
        LayerType.FULL.value: write_rope(config.rope_theta, config.rope_scaling),
        LayerType.SLIDING.value: write_rope(config.rope_local_base_freq or config.rope_theta, None),
    }
    return write_gemma(config, "Gemma3ForCausalLM", "gemma3_text", rope_parameters=sections)


FAMILY = decoder_family(
    "gemma3",
    "Gemma3ForCausalLM",
    read_config,
    write_config,
    COMPUTES | {"qk_norm": (True,), "rope_local_base_freq": ANY},
)
