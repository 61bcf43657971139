"""What the vision tower and the document model are."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from vishwamai.config import Config
from vishwamai.models.config import TextConfig


class PositionTable(StrEnum):
    """How the vision tower learns its positions."""

    TABLE = "table"  # one vector per cell of the grid, as published
    FACTORISED = "factorised"  # row vector + column vector; summed into a table on export


class ImageMask(StrEnum):
    """What image tokens see of their own image inside the language model."""

    CAUSAL = "causal"  # only what stands before (LlavaForConditionalGeneration)
    PREFIX = "prefix"  # all of it


class Pooling(StrEnum):
    """What happens to image features before the projector."""

    NONE = "none"
    AVERAGE_2X2 = "average_2x2"  # a quarter of the tokens


class VisionConfig(Config):
    """SigLIP, or fixed-resolution SigLIP-2, in Hugging Face's names (`siglip_vision_model`)."""

    hidden_size: int = Field(gt=0, description="width D of the tower")
    intermediate_size: int = Field(gt=0, description="width F of its feed-forward block")
    num_hidden_layers: int = Field(gt=0, description="layers of the tower")
    num_attention_heads: int = Field(gt=0, description="attention heads; must divide hidden_size")
    image_size: int = Field(gt=0, description="side in pixels of the square that the position table stands for")
    patch_size: int = Field(gt=0, description="side in pixels of a patch")
    num_channels: int = Field(3, ge=3, le=3, description="colour channels: pages are RGB")
    layer_norm_eps: float = Field(1e-6, gt=0, description="epsilon of LayerNorm")
    vision_use_head: bool = Field(False, description="carry the pooling head's weights (never run, for export)")
    positions: PositionTable = Field(PositionTable.TABLE, description="table, or factorised into rows and columns")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size} is smaller than patch_size={self.patch_size}")
        return self

    @property
    def grid(self) -> int:
        """Rows (and columns) of the position table."""
        return self.image_size // self.patch_size

    @property
    def patch_features(self) -> int:
        """Numbers in one patch, C."""
        return self.num_channels * self.patch_size**2


class ParsitConfig(Config):
    """SigLIP tower -> projector -> decoder."""

    text: TextConfig = Field(description="the language model")
    vision: VisionConfig = Field(description="the vision tower")
    projector: str = Field("mlp2x_gelu", pattern=r"^(linear|mlp[1-9]x_gelu)$", description="linear or mlpNx_gelu")
    pooling: Pooling = Field(Pooling.NONE, description="pooling of image features before the projector")
    vision_feature_layer: int = Field(-1, description="which hidden state of the tower is used: -1 (last) or -2")
    image_mask: ImageMask = Field(ImageMask.CAUSAL, description="causal, or prefix: an image sees all of itself")
    image_token_id: int = Field(ge=0, description="token whose embedding an image feature takes")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        depth = self.vision.num_hidden_layers
        if not -depth <= self.vision_feature_layer <= -1:
            raise ValueError(f"vision_feature_layer={self.vision_feature_layer} is not in [-{depth}, -1]")
        if self.image_token_id >= self.text.vocab_size:
            raise ValueError(f"image_token_id={self.image_token_id} is outside vocab_size={self.text.vocab_size}")
        return self

    @property
    def feature_layers(self) -> int:
        """How many layers of the tower run."""
        return self.vision.num_hidden_layers + 1 + self.vision_feature_layer

    @property
    def projector_layers(self) -> int:
        """How many linear layers the projector has."""
        return 1 if self.projector == "linear" else int(self.projector[len("mlp")])
