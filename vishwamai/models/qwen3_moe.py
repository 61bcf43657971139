"""Qwen3-MoE (`Qwen3MoeForCausalLM`): Qwen3 with mixtures of experts."""

from collections.abc import Mapping
from typing import Any

from vishwamai.convert.decoder import ANY, decoder_family, read_decoder, write_decoder
from vishwamai.convert.hf_config import Reader, build
from vishwamai.convert.mixture_keys import CONSTANTS, unsupported_mixture
from vishwamai.models.config import AttentionBias, BalanceScope, MixtureConfig, TextConfig

DEFAULTS = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False,
    initializer_range=0.02,
)  # fmt: skip


def read_config(source: Mapping[str, Any], where: str = "config.json") -> TextConfig:
    """A TextConfig from a `qwen3_moe` config.json. Raises ConfigError for what the decoder doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["qwen3_moe"], "this is no Qwen3-MoE text model")
    bias = AttentionBias.ALL if reader.get("attention_bias", False) else AttentionBias.NONE
    window = reader.get("sliding_window", 4096) if reader.get("use_sliding_window", False) else None
    mixture = build(
        MixtureConfig,
        where,
        # Transformers 5 writes the second name, published files have the first.
        num_experts=reader.get("num_experts", reader.get("num_local_experts", 128)),
        num_experts_per_tok=reader.get("num_experts_per_tok", 8),
        moe_intermediate_size=reader.get("moe_intermediate_size", 768),
        norm_topk_prob=reader.get("norm_topk_prob", False),
        decoder_sparse_step=reader.get("decoder_sparse_step", 1),
        mlp_only_layers=tuple(reader.get("mlp_only_layers", ())),
        router_aux_loss_coef=reader.get("router_aux_loss_coef", 0.001),
        aux_loss_scope=BalanceScope.MODEL,
    )
    return read_decoder(reader, DEFAULTS, attention_bias=bias, sliding_window=window, mixture=mixture)


def write_config(config: TextConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `Qwen3MoeForCausalLM`."""
    window = config.sliding_window
    mixture = config.mixture.model_dump(mode="json", include=set(CONSTANTS))
    return write_decoder(
        config,
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        attention_bias=config.attention_bias is AttentionBias.ALL,
        use_sliding_window=window is not None,
        sliding_window=window,
        **mixture,
    )


FAMILY = decoder_family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    read_config,
    write_config,
    dict(
        qk_norm=(True,),
        attention_bias=(AttentionBias.NONE, AttentionBias.ALL),
        sliding_window=ANY,
        mixture=ANY,
    ),
    further=unsupported_mixture("Qwen3MoeForCausalLM", CONSTANTS),
)
