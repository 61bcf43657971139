"""Conversations to tokens: rendered once by the chat template, with a mask of what the assistant learns.

Templates are of the ChatML kind: a turn is `<|im_start|>role\\n ... <|im_end|>`. What a message may hold
stands in `chat_template`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from vishwamai.chat_template import (
    IMAGE_MARKUP,
    IMAGE_TOKEN,
    ConversationError,
    Message,
    render,
    render_escaped,
    roles,
)
from vishwamai.tokenizer import VishwamAITokenizer, blanked

__all__ = [
    "IMAGE_MARKUP",
    "IMAGE_TOKEN",
    "ConversationError",
    "EncodedConversation",
    "Message",
    "encode_conversation",
    "encode_prompt",
    "render",
]

# A turn of the assistant: what it learns to write is group 1, through the end of the turn. An empty think
# block comes from the template, so it is read and not learned.
_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant\n(?:<think>\s*</think>\n{0,2})?(.*?<\|im_end\|>)", re.DOTALL)


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as tokens.

    Attributes:
        tokens: ids.
        loss_mask: True where the token is one that the assistant learns to write.
        image_spans: for each image in order the half-open range of its image tokens.
    """

    tokens: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    image_spans: tuple[tuple[int, int], ...]

    @property
    def feature_index(self) -> Int32[np.ndarray, " T"]:
        """For image tokens the running number of the image feature that takes their place, -1 for text."""
        index = np.full(self.tokens.shape, -1, np.int32)
        feature = 0
        for start, end in self.image_spans:
            index[start:end] = np.arange(feature, feature + end - start)
            feature += end - start
        return index


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: VishwamAITokenizer,
    *,
    image_tokens: Sequence[int] = (),
    **kwargs: Any,
) -> EncodedConversation:
    """A conversation to train on: the loss is on what the assistant says, through its `<|im_end|>`.

    The conversation is rendered once and the turns are found in the whole: Qwen3's template drops earlier
    thoughts, so the rendering of the first messages is no prefix of it. The ids are those of the whole text.
    A newline at the start of an answer that joins the header's in one token is not learned, since it can't be
    written behind the header.

    Special tokens spelled in a message are ordinary text, so no content can forge a turn or an image; in a
    user's or a tool's message `<think>` and the like are too.

    `image_tokens`: how many tokens each image takes, in order. `kwargs` go to the template.

    Raises:
        ConversationError: as `render`; no turn of the assistant; more or fewer images than `image_tokens`; text
            that is no Unicode.
    """
    encoded = _encode(messages, tokenizer, image_tokens, **kwargs)
    if not any(message["role"] == "assistant" for message in messages):
        raise ConversationError(f"the conversation has no turn of the assistant to learn from: {roles(messages)}")
    if not encoded.loss_mask.any():
        raise ConversationError(
            f"the chat template in {tokenizer.folder} writes no turn of the form "
            "<|im_start|>assistant ... <|im_end|>: training on other templates is not supported"
        )
    return encoded


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: VishwamAITokenizer,
    *,
    image_tokens: Sequence[int] = (),
    enable_thinking: bool = False,
    **kwargs: Any,
) -> EncodedConversation:
    """A conversation to answer: it ends with the header of the assistant's next turn, and carries no loss."""
    kwargs |= {"add_generation_prompt": True, "enable_thinking": enable_thinking}
    encoded = _encode(messages, tokenizer, image_tokens, **kwargs)
    return EncodedConversation(encoded.tokens, np.zeros_like(encoded.loss_mask), encoded.image_spans)


def _encode(
    messages: Sequence[Message], tokenizer: VishwamAITokenizer, image_tokens: Sequence[int], **kwargs: Any
) -> EncodedConversation:
    text, escaped = render_escaped(messages, tokenizer, **kwargs)
    try:
        ids, offsets = tokenizer.encode_with_offsets(text, plain=escaped)
    except ValueError as error:
        raise ConversationError(f"{error}; the conversation begins {text!r:.60}") from error
    tokens = np.asarray(ids, np.int32)
    starts, stops = np.asarray(offsets, np.int32).reshape(-1, 2).T
    loss_mask = np.zeros(tokens.shape, bool)
    for turn in _ASSISTANT_TURN.finditer(blanked(text, escaped)):
        begin, end = turn.span(1)
        loss_mask |= (starts >= begin) & (starts < end)
        # A SentencePiece model that reads newlines as spaces folds the header's into the answer's first piece.
        for joined in np.flatnonzero((starts < begin) & (stops > begin)):
            loss_mask[joined] = text[begin : stops[joined]].strip() != ""

    added = tokenizer.added_tokens.get(IMAGE_TOKEN)
    places = np.flatnonzero(tokens == added.id) if added is not None else np.zeros(0, np.int64)
    if len(places) != len(image_tokens):
        without = "" if added is not None else f"; the tokenizer in {tokenizer.folder} has no {IMAGE_TOKEN}"
        raise ConversationError(
            f"the messages hold {len(places)} images and {len(image_tokens)} images are given: "
            f"each image takes one {{'type': 'image'}} item, in order{without}"
        )
    loss_mask[places] = False  # an image is shown, never said
    if any(count < 1 for count in image_tokens):
        raise ConversationError(f"each image takes at least one token, found {list(image_tokens)}")
    repeats = np.ones(len(tokens), np.int64)  # the template writes one token for each image
    repeats[places] = image_tokens
    starts = (np.cumsum(repeats) - repeats)[places]
    spans = tuple((int(start), int(start + count)) for start, count in zip(starts, image_tokens, strict=True))
    return EncodedConversation(np.repeat(tokens, repeats), np.repeat(loss_mask, repeats), spans)
