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
    groups = [[number] for number in range(len(data.datasets))] if weighted else [list(range(len(data.datasets)))]
    pools, weights, names = [], [], []
    for number, members in enumerate(groups):
        datasets = [data.datasets[member] for member in members]
        pools.append(_pool(datasets, data, tokenizer, (experiment.seed, number), held_out))
        weights.append(datasets[0].weight or 1.0)
        names.append(tuple(_name(data.datasets, member) for member in members))
    if len(data.datasets) == 1:
        names = []  # nothing is mixed
    _tell_plan(pools, weights, names)
    room = Capacity(data.max_length)
    return MixedBatches(tuple(pools), tuple(weights), room, experiment.training.batch_size, tuple(names))


def _tell_plan(pools: Sequence[PackedPool], weights: Sequence[float], names: Sequence[tuple[str, ...]]) -> None:
    """Logs the share of each dataset in all tokens: weights are of rows, and one dataset's may be fuller."""
    shares = [weight / len(pool.plan) * pool.tokens_per_epoch for pool, weight in zip(pools, weights, strict=True)]
    for number, group in enumerate(names):
        for place, name in enumerate(group):
            tokens = f"{pools[number].tokens_per_epoch[place]:,}"
            percent = 100 * shares[number][place] / sum(map(np.sum, shares))
            logger.info("%s: %s tokens an epoch, planned as %.1f %% of all tokens", name, tokens, percent)


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


def _name(datasets: Sequence[DatasetConfig], number: int) -> str:
    """What the log calls a dataset: the end of its path, with its number where another is called the same."""
    ends = [Path(dataset.path or dataset.json_path).name for dataset in datasets]
    return f"{ends[number]}.{number}" if ends.count(ends[number]) > 1 else ends[number]
