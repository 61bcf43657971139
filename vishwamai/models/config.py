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
