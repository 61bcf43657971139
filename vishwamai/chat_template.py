"""Conversations to text, by the checkpoint's own Jinja chat template: as Transformers does, but without it.

A message is `{"role": ..., "content": ...}`; content is a text, or a list of `{"type": "text", "text": ...}`
and `{"type": "image"}`, which the template gets as one text with `IMAGE_MARKUP` for each image. Other keys of
a message (`reasoning_content`, `tool_calls`) go to the template as they are.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from vishwamai.tokenizer import VishwamAITokenizer
from vishwamai.tokenizer_backends import added_token_pattern, is_markup

ROLES = ("system", "user", "assistant", "tool")
IMAGE_TOKEN = "<|image_pad|>"
IMAGE_MARKUP = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
# These part the turns, also where a tokenizer spells them in pieces.
_TURN_MARKS = ("<|im_start|>", "<|im_end|>")

Message = Mapping[str, Any]


class ConversationError(ValueError):
    """A conversation that can't be rendered or learned from; the message says what and where."""


def render(messages: Sequence[Message], template: str, *, add_generation_prompt: bool = False, **kwargs: Any) -> str:
    """The text of a conversation, as Transformers' `apply_chat_template(tokenize=False)` gives it.

    `kwargs` go to the template (Qwen3: `enable_thinking=False` for an answer without thoughts; others ask for
    the tokenizer's `special_tokens`).

    Raises:
        ConversationError: no message, an unknown role, content of another form, or the template refused.
    """
    prepared = []
    for message, parts in _with_parts(messages):
        prepared.append({**message, "content": "".join(text for text, _ in parts)})
    return _render(prepared, template, add_generation_prompt=add_generation_prompt, **kwargs)


def render_escaped(
    messages: Sequence[Message], tokenizer: VishwamAITokenizer, **kwargs: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of `render`, and the ranges of its characters where content spells an added token.

    Such a stretch is put between two characters that no message contains, to see where the template left it.
    """
    if tokenizer.chat_template is None:
        raise ConversationError(f"the tokenizer in {tokenizer.folder} has no chat template")
    conversation = _with_parts(messages)
    opening, closing = _unused_characters([kwargs, *([parts, _others(message)] for message, parts in conversation)])
    patterns = {role: _escaped_pattern(role, tokenizer) for role in ROLES}

    def marked(value: Any, pattern: re.Pattern[str]) -> Any:
        match value:
            case str():
                return pattern.sub(lambda found: opening + found.group() + closing, value)
            case Mapping():
                return {marked(key, pattern): marked(item, pattern) for key, item in value.items()}
            case list() | tuple():
                return [marked(item, pattern) for item in value]
            case _:
                return value

    prepared = []
    for message, parts in conversation:
        pattern = patterns[message["role"]]
        content = "".join(text if is_image else marked(text, pattern) for text, is_image in parts)
        prepared.append({"role": message["role"], "content": content, **marked(_others(message), pattern)})
    rendered = _render(prepared, tokenizer.chat_template, **(tokenizer.special_tokens | kwargs))

    pieces = re.split(f"([{opening}{closing}])", rendered)  # text, mark, text, mark, ..., text
    if pieces[1::4] + pieces[3::4] != [opening] * len(pieces[1::4]) + [closing] * len(pieces[1::4]):
        raise ConversationError(
            "the chat template cuts a message in the middle of text that spells a special token: "
            "remove that text from the message"
        )
    text, escaped = "", []
    for index, piece in enumerate(pieces[::2]):
        if index % 2:  # between two marks
            escaped.append((len(text), len(text) + len(piece)))
        text += piece
    return text, escaped


def roles(messages: Sequence[Message]) -> str:
    """The roles of a conversation, for an error message."""
    return "its roles are " + (", ".join(str(message.get("role")) for message in messages) or "none")


def _with_parts(messages: Sequence[Message]) -> list[tuple[Message, list[tuple[str, bool]]]]:
    """Each message with its content as (text, is an image)."""
    if not messages:
        raise ConversationError("a conversation has at least one message, found none")
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            found = message.get("role") if isinstance(message, Mapping) else message
            raise ConversationError(f"message {index}: expected a role of {', '.join(ROLES)}, found {found!r:.100}")
        content = message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list | tuple):
            raise ConversationError(f"message {index}: content is a text or a list of items, found {content!r:.100}")
        parts: list[tuple[str, bool]] = []
        for item in items:
            match item:
                case {"type": "text", "text": str(text)}:
                    # Joined, so that no two of them spell a token between them.
                    if parts and not parts[-1][1]:
                        text = parts.pop()[0] + text
                    parts.append((text, False))
                case {"type": "image"}:
                    parts.append((IMAGE_MARKUP, True))
                case _:
                    raise ConversationError(
                        f"message {index}: an item is a text ({{'type': 'text', 'text': ...}}) or an image "
                        f"({{'type': 'image'}}), found {item!r:.100}"
                    )
        result.append((message, parts))
    return result


@lru_cache(maxsize=64)
def _escaped_pattern(role: str, tokenizer: VishwamAITokenizer) -> re.Pattern[str]:
    """Finds what may not become an added token in a message of `role`.

    Special tokens, whoever wrote them. From users and tools also all else that structures a conversation:
    `<think>` and `<tool_call>` are the assistant's to write. Words and spaces among the added tokens (Gemma
    has some) stay tokens.
    """
    template = tokenizer.chat_template or ""

    def is_escaped(text: str, special: bool) -> bool:
        structures = is_markup(text) or (text.strip() != "" and text in template)
        return special or (structures and role in ("user", "tool"))

    added = tokenizer.added_tokens.items()
    return added_token_pattern([*_TURN_MARKS, *(text for text, token in added if is_escaped(text, token.special))])


def _others(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in ("role", "content")}


def _unused_characters(values: Any) -> tuple[str, str]:
    """Two private-use characters that occur in none of the texts in `values`."""
    used = set().union(*_texts(values))
    free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    return next(free), next(free)


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            yield from (text for pair in value.items() for text in _texts(pair))
        case list() | tuple():
            yield from (text for item in value for text in _texts(item))


def _render(messages: Sequence[Message], template: str, *, add_generation_prompt: bool = False, **kwargs: Any) -> str:
    # Templates may ask whether tools and documents are none, which what is undefined is not.
    variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **kwargs}
    try:
        return _compiled(template).render(messages=messages, **variables)
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # the latter two: tool calls of another form
        raise ConversationError(f"the chat template refused the conversation ({roles(messages)}): {error}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """The template in a sandbox with what Transformers gives templates, so that the text is the same."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)
