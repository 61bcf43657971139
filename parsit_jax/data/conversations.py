"""Records that show images -> messages and images."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from parsit_jax.data.examples import Encoder
from parsit_jax.documents.images import ImageError, load_image
from vishwamai.chat import ConversationError, EncodedConversation
from vishwamai.data.conversations import messages_of
from vishwamai.data.packing import Example
from vishwamai.data.sources import DataError, Record

# The line break that sets a mark off from the text is no part of the question: nobody types it later.
_MARK = re.compile(r"<image>\n?|\n<image>$")


@dataclass(frozen=True)
class PageConversation:
    """Messages, and the files of the images that they show, in order."""

    messages: list[dict[str, Any]]
    images: tuple[Path, ...]


def parse(record: Record) -> PageConversation:
    """A record's messages with each `<image>` of a user as an image item, and its images' paths.

    The paths are those under `image` or `images`, or stand in the image items of `messages` themselves.
    Raises DataError where they are not as many as the marks.
    """
    listed = [path for key in ("image", "images") for path in _paths(record.data.get(key), key, record.where)]
    messages, named = [], []
    for message in messages_of(record):
        items = _items(message, f"{record.where}: a turn of {message['role']}")
        for item in items:
            if item.get("type") == "image" and "image" in item:
                named += _paths(item.pop("image"), "the image of an item", record.where)
        messages.append({**message, "content": items})
    marks = sum(item.get("type") == "image" for message in messages for item in message["content"])
    paths = named or listed
    if marks != len(paths) or named and listed:
        raise DataError(
            f"{record.where} has {marks} <image> marks in what the user says and "
            f"{len(named) + len(listed)} images: each image needs one mark"
        )
    folder = record.path.parent if record.files.image_folder is None else Path(record.files.image_folder)
    return PageConversation(messages, tuple(folder / path for path in paths))


def _paths(value: Any, name: str, where: str) -> list[str]:
    paths = [value] if isinstance(value, str) else value or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError(f"{where}: {name} is {value!r:.80}, expected a path or a list of paths")
    return paths


def _items(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The content as a list of items."""
    content = message["content"]
    if isinstance(content, list):
        if not all(isinstance(item, dict) for item in content):
            raise DataError(f"{where} is {content!r:.80}, expected text or items with a type")
        return [dict(item) for item in content]
    if message["role"] != "user":
        return [{"type": "text", "text": content}]
    items, at = [], 0
    for mark in _MARK.finditer(content):
        items += [{"type": "text", "text": content[at : mark.start()]}, {"type": "image"}]
        at = mark.end()
    items.append({"type": "text", "text": content[at:]})
    return [item for item in items if item["type"] == "image" or item["text"]]


def encode(record: Record, encoder: Encoder) -> tuple[PageConversation, EncodedConversation]:
    """A record and its tokens; no image is opened. Raises DataError."""
    page = parse(record)
    try:
        return page, encoder.conversation(page.messages, [encoder.layout.tokens] * len(page.images))
    except ConversationError as error:
        raise DataError(f"{record.where}: {error}") from error


def measure(record: Record, encoder: Encoder) -> tuple[int, int]:
    """The tokens and patches that a record takes. Raises DataError, also where an image is not there."""
    page, conversation = encode(record, encoder)
    for path in page.images:
        if not path.is_file():
            raise DataError(f"{record.where}: no image file {path}: does image_folder say where paths start?")
    return len(conversation.tokens), len(page.images) * encoder.layout.patches


def load(record: Record, encoder: Encoder) -> Example:
    """A record with its images. Raises DataError."""
    page, conversation = encode(record, encoder)
    try:
        images: list[Image.Image] = [load_image(path) for path in page.images]
    except ImageError as error:
        raise DataError(f"{record.where}: {error}") from error
    return encoder.example(conversation, [encoder.patches(image) for image in images])
