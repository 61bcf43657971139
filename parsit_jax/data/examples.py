"""A conversation about images -> an example."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from parsit_jax.documents.patches import image_layout, image_size, patchify, preprocess
from parsit_jax.models.config import ParsitConfig
from vishwamai.chat import EncodedConversation, Message, encode_conversation
from vishwamai.data.packing import Example, ImageLayout
from vishwamai.tokenizer import VishwamAITokenizer


@dataclass(frozen=True)
class Encoder:
    """What turns messages and their images into tokens and patches, the same for every example."""

    tokenizer: VishwamAITokenizer
    size: tuple[int, int]
    patch_size: int
    layout: ImageLayout

    @classmethod
    def of(cls, config: ParsitConfig, tokenizer: VishwamAITokenizer, size: tuple[int, int] | None = None) -> "Encoder":
        """For a model, with images at `size` (height, width) or at the model's own."""
        size = image_size(config, size)
        return cls(tokenizer, size, config.vision.patch_size, image_layout(config, *size))

    def conversation(self, messages: Sequence[Message], image_tokens: Sequence[int]) -> EncodedConversation:
        """The tokens alone, with so many for each image. Raises ConversationError."""
        return encode_conversation(messages, self.tokenizer, image_tokens=list(image_tokens))

    def patches(self, image: Image.Image) -> np.ndarray:
        """The patches of one image, uint8 P C."""
        return patchify(preprocess(image, *self.size), self.patch_size)

    def example(
        self,
        conversation: EncodedConversation,
        patches: Sequence[np.ndarray],
        positions: Sequence[np.ndarray] | None = None,
    ) -> Example:
        """Tokens and patches together; the loss is on what the assistant says, each token equally."""
        return Example(
            tokens=conversation.tokens,
            loss_weights=conversation.loss_mask.astype(np.float32),
            feature_index=conversation.feature_index,
            images=tuple(patches),
            positions=None if positions is None else tuple(positions),
        )
