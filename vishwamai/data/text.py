"""The `data:` section of a text model -> the batch of every step."""

import numpy as np
from pydantic import Field

from vishwamai.chat import ConversationError, encode_conversation
from vishwamai.config import Config
from vishwamai.data.conversations import check_vocabulary, messages_of
from vishwamai.data.lengths import length_index
from vishwamai.data.mixture import MixedBatches
from vishwamai.data.packing import Capacity, Example
from vishwamai.data.pool import PackedPool, TooLong
from vishwamai.data.sources import DataError, FilesConfig, Record, Records
from vishwamai.experiment import Experiment
from vishwamai.tokenizer import VishwamAITokenizer


class TextData(Config):
    """What a text model learns from."""

    max_length: int = Field(gt=0, description="tokens of a row, T")
    datasets: list[FilesConfig] = Field(min_length=1, description="files of conversations, shuffled together")
    too_long: TooLong = Field(
        TooLong.ERROR, description="examples longer than a row: error, or skip (counted in the log)"
    )


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
    """Global batches of packed conversations, by step number. Raises DataError for unusable files."""
    data: TextData = experiment.data
    check_vocabulary(tokenizer, experiment.model)
    seed = (experiment.seed, 0)
    records = Records(data.datasets, seed, FilesConfig)
    lengths = length_index(records, lambda record: (len(example(record, tokenizer).tokens), 0), tokenizer, "text")
    room = Capacity(data.max_length)
    pool = PackedPool(records, lengths, lambda record: example(record, tokenizer), room, seed, data.too_long)
    return MixedBatches((pool,), (1.0,), room, experiment.training.batch_size)
