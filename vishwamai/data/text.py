"""The `data:` section of a text model -> the batch of every step."""

import logging
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from vishwamai.chat import ConversationError, encode_conversation
from vishwamai.config import Config
from vishwamai.data.conversations import check_vocabulary, messages_of
from vishwamai.data.documents import Documents, DocumentsConfig, open_documents
from vishwamai.data.joined import Joined
from vishwamai.data.lengths import length_index
from vishwamai.data.mixture import MixedBatches, all_or_none
from vishwamai.data.packing import Capacity, Example
from vishwamai.data.pieces import Piece, open_pieces
from vishwamai.data.pool import PackedPool, TooLong
from vishwamai.data.sources import DataError, FilesConfig, Record, Records, SampledConfig
from vishwamai.experiment import Experiment
from vishwamai.tokenizer import VishwamAITokenizer

logger = logging.getLogger(__name__)


class LongDocuments(StrEnum):
    """What happens to a document that is longer than a row."""

    SPLIT = "split"  # it becomes several examples, and nothing is lost
    WHOLE = "whole"  # it stays one, and `too_long` says what happens to that


class DatasetConfig(FilesConfig, DocumentsConfig):
    """Conversations (`json_path`), or text documents (`path`)."""

    json_path: str | None = Field(
        None, description="conversations: " + str(FilesConfig.model_fields["json_path"].description)
    )
    path: str | None = Field(None, description="documents: " + str(DocumentsConfig.model_fields["path"].description))
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="share of the rows; where no dataset has one, all are shuffled together",
    )

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.json_path is None) == (self.path is None):
            raise ValueError("a dataset has either json_path (conversations) or path (documents)")
        for name in DocumentsConfig.model_fields if self.path is None else ():
            default = type(self).model_fields[name].default
            if name not in SampledConfig.model_fields and getattr(self, name) != default:
                raise ValueError(f"{name} has no meaning for conversations (json_path)")
        return self


class TextData(Config):
    """What a text model learns from."""

    max_length: int = Field(gt=0, description="tokens of a row, T")
    datasets: list[DatasetConfig] = Field(min_length=1, description="what is learned from, mixed by weight")
    held_out: list[DocumentsConfig] = Field(
        [], description="documents to evaluate on; their texts are never learned, also where a dataset has them"
    )
    too_long: TooLong = Field(
        TooLong.ERROR, description="examples longer than a row: error, or skip (counted in the log)"
    )
    long_documents: LongDocuments = Field(
        LongDocuments.SPLIT, description="documents longer than a row: split them, or keep them whole (see too_long)"
    )

    @model_validator(mode="after")
    def _weights(self) -> Self:
        all_or_none(self.datasets)
        return self


def example(record: Record, tokenizer: VishwamAITokenizer) -> Example:
    """A conversation, learned where the assistant speaks. Raises DataError, also where it is about images."""
    if images := record.data.get("image") or record.data.get("images"):
        raise DataError(f"{record.where} shows {images!r:.80}, which a text model can't see: leave it out")
    try:
        conversation = encode_conversation(messages_of(record), tokenizer)
    except ConversationError as error:
        raise DataError(f"{record.where}: {error}") from error
    return Example(conversation.tokens, conversation.loss_mask.astype(np.float32))


def batch_source(experiment: Experiment, tokenizer: VishwamAITokenizer) -> MixedBatches:
    """Global batches of packed documents and conversations, by step number. Raises DataError for unusable files."""
    data: TextData = experiment.data
    check_vocabulary(tokenizer, experiment.model)
    held_out = open_documents(data.held_out, experiment.seed) if data.held_out else None
    weighted = data.datasets[0].weight is not None
    groups = [[dataset] for dataset in data.datasets] if weighted else [data.datasets]
    streams = tuple(
        _pool(group, data, tokenizer, (experiment.seed, number), held_out) for number, group in enumerate(groups)
    )
    weights = tuple(group[0].weight or 1.0 for group in groups)
    names = iter(_names(data.datasets))
    named = tuple(tuple(next(names) for _ in group) for group in groups) if len(data.datasets) > 1 else ()
    # A row of one dataset may be fuller than one of another: weights are of rows, what is told is of tokens.
    planned = [weight / len(pool.plan) * pool.tokens_per_epoch for weight, pool in zip(weights, streams, strict=True)]
    for group, pool, shares in zip(named, streams, planned, strict=bool(named)):
        for name, tokens, share in zip(group, pool.tokens_per_epoch, shares / sum(map(np.sum, planned)), strict=True):
            logger.info("%s: %s tokens an epoch, planned as %.1f %% of all tokens", name, f"{tokens:,}", 100 * share)
    return MixedBatches(streams, weights, Capacity(data.max_length), experiment.training.batch_size, named)


def _pool(
    datasets: Sequence[DatasetConfig],
    data: TextData,
    tokenizer: VishwamAITokenizer,
    seed: tuple[int, int],
    held_out: Documents | None,
) -> PackedPool:
    """The rows of one dataset, or of several shuffled together."""
    room, parts, lengths = Capacity(data.max_length), [], []

    def load(item: Record | Piece) -> Example:
        return item.example(tokenizer) if isinstance(item, Piece) else example(item, tokenizer)

    for dataset in datasets:
        if dataset.path is None:
            records = Records([dataset], seed, FilesConfig)
            parts.append(records)
            lengths.append(length_index(records, lambda record: load(record).size, tokenizer, "text"))
        else:
            longest = room.tokens if data.long_documents is LongDocuments.SPLIT else None
            pieces = open_pieces(open_documents([dataset], seed[0]), tokenizer, longest, held_out)
            parts.append(pieces)
            lengths.append(pieces.lengths)
    items = Joined(parts)
    return PackedPool(items, np.concatenate(lengths), load, room, seed, data.too_long, items.ends)


def _names(datasets: Sequence[DatasetConfig]) -> list[str]:
    """What the log calls each: the end of its path, with its number where two are called the same."""
    ends = [Path(dataset.path or dataset.json_path).name for dataset in datasets]
    return [f"{end}.{number}" if ends.count(end) > 1 else end for number, end in enumerate(ends)]
