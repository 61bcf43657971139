"""What a decoder is, in the field's own names (Hugging Face's, where it has one)."""

from enum import StrEnum
from typing import Self

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


class TextConfig(Config):
    """A decoder-only transformer."""

    vocab_size: int = Field(gt=0, description="rows of the token embedding")
    hidden_size: int = Field(gt=0, description="width D of the residual stream")
    intermediate_size: int = Field(gt=0, description="width F of the SwiGLU block")
    num_hidden_layers: int = Field(gt=0, description="layers")
    num_attention_heads: int = Field(gt=0, description="query heads N")
    num_key_value_heads: int = Field(gt=0, description="key/value heads K; N must be a multiple of it")
    head_dim: int = Field(gt=0, description="width H of one head; must be even")
    max_position_embeddings: int = Field(32768, gt=0, description="longest context")
    rope_theta: float = Field(1_000_000.0, gt=0, description="base of the rotary embedding")
    rope_scaling: RopeScaling | None = Field(None, description="how the rotary embedding is stretched, if it is")
    qk_norm: bool = Field(True, description="RMSNorm of each query and key head")
    attention_bias: AttentionBias = Field(AttentionBias.NONE, description="biases of attention: none, qkv or all")
    mlp_bias: bool = Field(False, description="biases of the SwiGLU block")
    sliding_window: int | None = Field(None, gt=0, description="latest tokens that attention sees; null is all")
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
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
        return self
