"""Drawn pages as an endless stream of rows: page i of a dataset is a pure function of (seed, dataset, i)."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parsit_jax import prompts
from parsit_jax.data.config import DatasetConfig, Task
from parsit_jax.data.examples import Encoder
from parsit_jax.documents.generator import Document, Split, generate
from vishwamai.chat import Message
from vishwamai.data.packing import Example
from vishwamai.data.pool import TooLong
from vishwamai.data.sources import DataError

_ATTEMPTS = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedRows:
    """A RowStream of drawn pages. `seed` tells this dataset from every other: the run's seed, its number."""

    config: DatasetConfig
    encoder: Encoder
    max_length: int
    seed: tuple[int, ...]
    too_long: TooLong = TooLong.ERROR

    def row(self, index: int) -> list[Example]:
        """The pages of row `index`."""
        count = self.config.pages_per_row
        return [self.page(index * count + i) for i in range(count)]

    def page(self, index: int) -> Example:
        """Page `index` with as many of its questions as fit.

        Raises DataError when not even one fits (with `skip`: when none of many pages drawn instead does).
        """
        room = self.max_length // self.config.pages_per_row
        for attempt in range(_ATTEMPTS if self.too_long is TooLong.SKIP else 1):
            seed = int(np.random.SeedSequence([*self.seed, index, attempt]).generate_state(1, np.uint64)[0])
            document = generate(self.config.generated, seed, Split.TRAIN, self.encoder.size)
            for messages in conversations(document, self.config, seed):
                conversation = self.encoder.conversation(messages, images=1)
                if len(conversation.tokens) <= room:
                    return self.encoder.example(conversation, [document.image])
            needed = len(conversation.tokens)
            logger.warning("page %s of %s needs %s tokens: drawn anew", index, self.config.generated, needed)
        raise DataError(
            f"a page of {self.config.generated} needs {len(conversation.tokens)} tokens, it may take {room}: "
            "raise data.max_length, lower pages_per_row, or have such pages drawn anew: data.too_long=skip"
        )


def conversations(document: Document, config: DatasetConfig, seed: int) -> Iterator[list[Message]]:
    """What may be said about a page, the longest first: its questions in random order, ever fewer."""
    if config.task is Task.TRANSCRIBE:
        yield dialogue([(prompts.READ_PAGE, document.transcription)])
        return
    order = np.random.default_rng([seed, 1]).permutation(len(document.questions))[: config.max_questions]
    asked = [(document.questions[i].text, document.questions[i].answer) for i in order]
    if not asked:
        raise DataError(f"{document.kind} have no questions: set task: transcribe")
    for count in range(len(asked), 0, -1):
        yield dialogue(asked[:count])


def dialogue(turns: list[tuple[str, str]]) -> list[Message]:
    """Questions and answers about one image, which comes first."""
    messages: list[Message] = []
    for question, answer in turns:
        content = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content if messages else [{"type": "image"}, *content]})
        messages.append({"role": "assistant", "content": answer})
    return messages
