"""What a decoder is, in the field's own names (Hugging Face's, where it has one)."""

from enum import StrEnum
from typing import NamedTuple, Self

from pydantic import Field, model_validator

from vishwamai.config import Config


class Remat(StrEnum):
    """What the backward pass recomputes instead of keeping."""

    NONE = "none"
    DOTS = "dots"  # keeps matrix products, recomputes the rest
    FULL = "full"  # keeps only each layer's input


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
        return self

    @property
    def kinds(self) -> list[LayerKind]:
        """Of all layers in order."""
        types = self.layer_types or (LayerType.SLIDING if self.sliding_window else LayerType.FULL,)
        return [LayerKind(types[i % len(types)], False) for i in range(self.num_hidden_layers)]
