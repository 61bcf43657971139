"""The ways a file spells a conversation -> messages with `role` and `content`."""

from typing import Any

from vishwamai.config import ConfigError
from vishwamai.data.sources import DataError, Record
from vishwamai.models.config import TextConfig
from vishwamai.tokenizer import VishwamAITokenizer

_ROLES = {"human": "user", "gpt": "assistant"}


def messages_of(record: Record) -> list[dict[str, Any]]:
    """The messages of a record: `messages` with role and content, or `conversations` with from and value.

    Raises DataError for anything else, and where no turn is the assistant's.
    """
    keys = [key for key in ("conversations", "messages") if key in record.data]
    if len(keys) != 1:
        found = ", ".join(record.data) or "nothing"
        raise DataError(f"{record.where} has {found}, expected one of `conversations` and `messages`")
    turns = record.data[keys[0]]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{record.where}: {keys[0]} is {turns!r:.80}, expected a list of turns")
    messages = [_message(turn, f"{record.where}: turn {number}") for number, turn in enumerate(turns, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{record.where} has no turn of the assistant (gpt) to learn from: its turns are {roles}")
    return messages


def _message(turn: Any, where: str) -> dict[str, Any]:
    match turn:
        case {"from": str(role), "value": str(content), **others}:
            pass
        case {"role": str(role), "content": str() | list() as content, **others}:
            pass
        case _:
            raise DataError(f"{where} is {turn!r:.80}, expected from and value, or role and content")
    return {**others, "role": _ROLES.get(role, role), "content": content}


def check_vocabulary(tokenizer: VishwamAITokenizer, config: TextConfig) -> None:
    """Raises ConfigError when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {tokenizer.folder} has {tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{config.vocab_size}: raise it, or name the model's own tokenizer"
        )
