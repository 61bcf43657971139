"""What a decoder is, in the field's own names (Hugging Face's, where it has one)."""

import math
from enum import StrEnum
from typing import NamedTuple, Self

from pydantic import Field, model_validator

from vishwamai.config import Config


class Remat(StrEnum):
    """What the backward pass recomputes instead of keeping."""

    NONE = "none"
    DOTS = "dots"  # keeps matrix products, recomputes the rest
    FULL = "full"  # keeps only each layer's input


class Softmax(StrEnum):
    """What attention subtracts from a row's logits, so that their exponentials stay finite."""

    RUNNING = "running"  # the largest that it has seen so far
    BOUNDED = "bounded"  # nothing: the model bounds its logits (Attention.max_logit)


class RopeType(StrEnum):
    """How rotary positions are stretched to a longer context (see rope.frequencies)."""

    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


class RopeScaling(Config):
    """Rotary positions of a model that reads further than it was first trained to; Hugging Face's names."""

    rope_type: RopeType = Field(description="linear, llama3 or yarn")
    factor: float = Field(ge=1, description="how many times longer the context became")
    original_max_position_embeddings: int | None = Field(None, gt=0, description="the context before (llama3, yarn)")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: pairs with fewer turns in it are stretched whole")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: pairs with more turns are left alone")
    beta_fast: float = Field(32.0, gt=0, description="yarn: pairs with more turns are left alone")
    beta_slow: float = Field(1.0, gt=0, description="yarn: pairs with fewer turns are stretched whole")
    truncate: bool = Field(True, description="yarn: round these two bounds to whole pairs")
    attention_factor: float | None = Field(None, gt=0, description="yarn: times cos and sin; null: 0.1 ln(factor) + 1")
    mscale: float | None = Field(None, ge=0, description="yarn: with mscale_all_dim, another such factor")
    mscale_all_dim: float | None = Field(None, ge=0, description="yarn: see mscale")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rope_type is not RopeType.LINEAR and self.original_max_position_embeddings is None:
            raise ValueError(f"rope_type {self.rope_type.value} needs original_max_position_embeddings")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}"
            )
        return self


class AttentionBias(StrEnum):
    """Which of attention's linear layers have biases."""

    NONE = "none"
    QKV = "qkv"
    ALL = "all"

    @property
    def of_layers(self) -> tuple[bool, bool]:
        """Whether the layers that make queries, keys and values have one, and the one that makes the output."""
        return self is not AttentionBias.NONE, self is AttentionBias.ALL


class LayerType(StrEnum):
    """What the attention of a layer sees."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"  # the latest `sliding_window` tokens


class Activation(StrEnum):
    """What the gate of a feed-forward block passes through: SwiGLU or GeGLU (Shazeer 2020)."""

    SILU = "silu"
    GELU = "gelu_pytorch_tanh"


class Scoring(StrEnum):
    """How a router's logits become scores: together, or each for itself (DeepSeek-V3)."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class BalanceScope(StrEnum):
    """Over what the load-balance loss takes its means before they are multiplied."""

    LAYER = "layer"  # each layer for itself, then the mean of their losses
    MODEL = "model"  # all layers together, as Transformers does


class MixtureConfig(Config):
    """Mixture-of-experts layers; names are those of Qwen3-MoE and DeepSeek-V3 at Hugging Face."""

    num_experts: int = Field(gt=0, description="experts E of a layer")
    num_experts_per_tok: int = Field(gt=0, description="experts k that each token goes to")
    moe_intermediate_size: int = Field(gt=0, description="width F of an expert")
    n_shared_experts: int = Field(0, ge=0, description="experts beside these that see every token")
    decoder_sparse_step: int = Field(1, gt=0, description="every so many layers are mixtures, the last of each group")
    mlp_only_layers: tuple[int, ...] = Field((), description="numbers of further layers that are dense")
    scoring_func: Scoring = Field(Scoring.SOFTMAX, description="softmax or sigmoid")
    norm_topk_prob: bool = Field(True, description="weights of the chosen experts sum to 1")
    n_group: int = Field(1, gt=0, description="groups of equally many neighbouring experts (DeepSeek-V3)")
    topk_group: int = Field(1, gt=0, description="groups that a token's experts may be of, those with the best two")
    routed_scaling_factor: float = Field(1.0, gt=0, description="factor of the weights")
    router_aux_loss_coef: float = Field(0.001, ge=0, description="weight of the load-balance loss")
    aux_loss_scope: BalanceScope = Field(BalanceScope.LAYER, description="layer or model: see training.routing")
    router_z_loss_coef: float = Field(0.0, ge=0, description="weight of the router's mean squared log Z (ST-MoE)")
    router_bias_update_rate: float = Field(
        0.0, ge=0, description="sigmoid: how far a step moves the biases that balance the load (DeepSeek-V3: 0.001)"
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="in training, an expert takes so many times its even share of a row; null: all that come",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}"
            )
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group={self.topk_group} of n_group={self.n_group}: num_experts={self.num_experts} must be a "
                "multiple of n_group, and topk_group at most n_group"
            )
        if (reach := self.topk_group * self.num_experts // self.n_group) < self.num_experts_per_tok:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {reach} experts of "
                f"topk_group={self.topk_group} of n_group={self.n_group}"
            )
        if self.router_bias_update_rate and not self.biased:
            raise ValueError("router_bias_update_rate balances sigmoid scores: set scoring_func to sigmoid, or it to 0")
        return self

    @property
    def biased(self) -> bool:
        """A bias takes part in the choice of experts."""
        return self.scoring_func is Scoring.SIGMOID

    def capacity(self, length: int) -> int | None:
        """How many of a row's tokens an expert takes; None is all."""
        if self.capacity_factor is None:
            return None
        even = length * self.num_experts_per_tok / self.num_experts
        return min(length, max(1, math.ceil(even * self.capacity_factor)))


class LayerKind(NamedTuple):
    """What distinguishes a decoder layer from another of the same model."""

    attention: LayerType
    sparse: bool  # a mixture of experts in place of the feed-forward block


class TextConfig(Config):
    """A decoder-only transformer."""

    vocab_size: int = Field(gt=0, description="rows of the token embedding")
    hidden_size: int = Field(gt=0, description="width D of the residual stream")
    intermediate_size: int = Field(gt=0, description="width F of the feed-forward block")
    num_hidden_layers: int = Field(gt=0, description="layers")
    num_attention_heads: int = Field(gt=0, description="query heads N")
    num_key_value_heads: int = Field(gt=0, description="key/value heads K; N must be a multiple of it")
    head_dim: int = Field(gt=0, description="width H of one head; must be even")
    max_position_embeddings: int = Field(32768, gt=0, description="longest context")
    rope_theta: float = Field(1_000_000.0, gt=0, description="base of the rotary embedding")
    rope_scaling: RopeScaling | None = Field(None, description="how the rotary embedding is stretched, if it is")
    rope_local_base_freq: float | None = Field(
        None, gt=0, description="another base for sliding layers, never stretched; null: they have the same"
    )
    qk_norm: bool = Field(True, description="RMSNorm of each query and key head")
    attention_bias: AttentionBias = Field(AttentionBias.NONE, description="biases of attention: none, qkv or all")
    mlp_bias: bool = Field(False, description="biases of the feed-forward block")
    hidden_act: Activation = Field(Activation.SILU, description="of the feed-forward block: silu or gelu_pytorch_tanh")
    sliding_window: int | None = Field(None, gt=0, description="latest tokens that sliding layers see; null is all")
    layer_types: tuple[LayerType, ...] | None = Field(
        None,
        min_length=1,
        description="sliding_attention and full_attention, repeated over the layers; null: all sliding if there is a "
        "sliding_window",
    )
    query_pre_attn_scalar: float | None = Field(
        None, gt=0, description="attention logits are divided by its root; null is head_dim"
    )
    attn_logit_softcapping: float | None = Field(None, gt=0, description="c: attention logits are c tanh(logit / c)")
    final_logit_softcapping: float | None = Field(None, gt=0, description="the same of the logits of tokens")
    mixture: MixtureConfig | None = Field(None, description="mixture-of-experts layers; null: all are dense")
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    zero_centered_norms: bool = Field(False, description="norms multiply by 1 + their scale")
    sandwich_norms: bool = Field(False, description="norms also behind attention and behind the feed-forward block")
    scale_embeddings: bool = Field(False, description="embeddings are multiplied by the root of hidden_size")
    tie_word_embeddings: bool = Field(True, description="the output matrix is the embedding's transpose")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; the rotary embedding turns pairs")
        if self.layer_types and LayerType.SLIDING in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types names sliding_attention, but there is no sliding_window")
        if self.mixture and self.mlp_bias:
            raise ValueError("mlp_bias: experts have no biases")
        if self.mixture and not any(kind.sparse for kind in self.kinds):
            raise ValueError(
                f"mixture: none of the {self.num_hidden_layers} layers is one, by decoder_sparse_step="
                f"{self.mixture.decoder_sparse_step} and mlp_only_layers={list(self.mixture.mlp_only_layers)}"
            )
        return self

    @property
    def bounds_logits(self) -> bool:
        """Whether attention's logits have a bound, whatever the text: see Softmax."""
        return self.qk_norm or self.attn_logit_softcapping is not None

    def rope(self, kind: LayerType) -> tuple[float, RopeScaling | None]:
        """Base of the rotary embedding and how it is stretched, in layers of this kind."""
        if self.rope_local_base_freq and kind is LayerType.SLIDING:
            return self.rope_local_base_freq, None
        return self.rope_theta, self.rope_scaling

    @property
    def kinds(self) -> list[LayerKind]:
        """Of all layers in order."""
        types = self.layer_types or (LayerType.SLIDING if self.sliding_window else LayerType.FULL,)
        return [LayerKind(types[i % len(types)], self._sparse(i)) for i in range(self.num_hidden_layers)]

    def _sparse(self, layer: int) -> bool:
        mixture = self.mixture
        if mixture is None or layer in mixture.mlp_only_layers:
            return False
        return (layer + 1) % mixture.decoder_sparse_step == 0
