"""Mixtral (`MixtralForCausalLM`): Mistral whose every layer is a mixture of experts."""

from collections.abc import Mapping
from typing import Any

from vishwamai.convert.decoder import ANY, SparseNames, decoder_family, read_decoder, write_decoder
from vishwamai.convert.hf_config import Reader, build
from vishwamai.convert.mixture_keys import unsupported_mixture
from vishwamai.models.config import BalanceScope, MixtureConfig, TextConfig

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
    initializer_range=0.02, rope_theta=1_000_000.0,
)  # fmt: skip


def read_config(source: Mapping[str, Any], where: str = "config.json") -> TextConfig:
    """A TextConfig from a `mixtral` config.json. Raises ConfigError for what the decoder doesn't compute."""
    reader = Reader(source, where)
    reader.insist("model_type", ["mixtral"], "this is no Mixtral text model")
    reader.insist("router_jitter_noise", [0], "routers see their input as it is")
    mixture = build(
        MixtureConfig,
        where,
        num_experts=reader.get("num_local_experts", 8),
        num_experts_per_tok=reader.get("num_experts_per_tok", 2),
        moe_intermediate_size=reader.get("intermediate_size", DEFAULTS["intermediate_size"]),
        router_aux_loss_coef=reader.get("router_aux_loss_coef", 0.001),
        aux_loss_scope=BalanceScope.MODEL,
    )
    window = reader.get("sliding_window", None)
    return read_decoder(reader, DEFAULTS, qk_norm=False, sliding_window=window, mixture=mixture)


def write_config(config: TextConfig) -> dict[str, Any]:
    """A config.json that Transformers opens as `MixtralForCausalLM`."""
    mixture = config.mixture
    return write_decoder(
        config,
        "MixtralForCausalLM",
        "mixtral",
        sliding_window=config.sliding_window,
        intermediate_size=mixture.moe_intermediate_size,
        num_local_experts=mixture.num_experts,
        num_experts_per_tok=mixture.num_experts_per_tok,
        router_aux_loss_coef=mixture.router_aux_loss_coef,
    )


FAMILY = decoder_family(
    "mixtral",
    "MixtralForCausalLM",
    read_config,
    write_config,
    dict(sliding_window=ANY, mixture=ANY),
    SparseNames("block_sparse_moe", "w1", "w3", "w2"),
    unsupported_mixture(
        "MixtralForCausalLM", ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef")
    ),
)
