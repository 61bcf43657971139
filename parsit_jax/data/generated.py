"""Drawn pages as an endless stream of rows: page i of a dataset is a pure function of (seed, dataset, i)."""

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from parsit_jax import prompts
from parsit_jax.data.config import DatasetConfig, Task
from parsit_jax.data.examples import Encoder
from parsit_jax.documents.generator import Document, Question, Split, generate
from parsit_jax.documents.patches import inked
from vishwamai.chat import Message
from vishwamai.data.packing import Capacity, Example
from vishwamai.data.pool import TooLong
from vishwamai.data.sources import DataError

_ATTEMPTS = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedRows:
    """A RowStream of drawn pages. `seed` tells this dataset from every other: the run's seed, its number."""

    config: DatasetConfig
    encoder: Encoder
    room: Capacity
    seed: tuple[int, ...]
    too_long: TooLong = TooLong.ERROR

    def row(self, index: int) -> list[Example]:
        """Row `index`: as many pages as fit, at least one.

        Raises DataError when not even one question fits (with `skip`: when that is so of many pages in turn).
        """
        examples: list[Example] = []
        tokens, patches = self.room.tokens, self.room.patches
        for attempt in range(_ATTEMPTS):
            if patches < self.least_patches:
                break
            document = self.document(index, attempt)
            example, needed = self.example(document, tokens, patches)
            if example is not None:
                examples.append(example)
                tokens, patches = tokens - example.size[0], patches - example.size[1]
            elif examples:
                break
            elif self.too_long is TooLong.ERROR:
                raise DataError(self.complaint(needed))
            else:
                _tell_of_skipping(self.config.generated, self.room.tokens, self.room.patches)
        if not examples:
            raise DataError(f"{_ATTEMPTS} pages in turn: {self.complaint(needed)}")
        return examples

    @property
    def least_patches(self) -> int:
        """No page takes fewer patches than this: below it, none is drawn in vain."""
        return 1 if self.config.skip_blank_patches else self.encoder.layout.patches

    def document(self, row: int, number: int) -> Document:
        """Page `number` that row `row` may show."""
        seed = np.random.SeedSequence([*self.seed, row, number]).generate_state(1, np.uint64)[0]
        return generate(self.config.generated, int(seed), Split.TRAIN, self.encoder.size)

    def example(self, document: Document, tokens: int, patches: int) -> tuple[Example | None, tuple[int, int]]:
        """A page with as many of its questions as fit, or None; and the tokens and patches of the shortest try."""
        pixels = self.encoder.patches(document.image)
        positions = None
        if self.config.skip_blank_patches:
            kept = inked(pixels)
            pixels, positions = pixels[kept], [self.encoder.layout.positions[kept]]
        image_tokens = [len(pixels) // self.encoder.layout.patches_per_feature]
        for messages in conversations(document, self.config):
            conversation = self.encoder.conversation(messages, image_tokens)
            needed = len(conversation.tokens), len(pixels)
            if needed[0] <= tokens and needed[1] <= patches:
                return self.encoder.example(conversation, [pixels], positions), needed
        return None, needed

    def complaint(self, needed: tuple[int, int]) -> str:
        """Why a page could not be used, and what to do."""
        return (
            f"a page of {self.config.generated} needs {needed[0]} tokens and {needed[1]} patches, a row holds "
            f"{self.room.tokens} and {self.room.patches}: raise data.max_length or data.max_patches, or have such "
            "pages drawn anew: data.too_long=skip"
        )


@cache
def _tell_of_skipping(kind: str, tokens: int, patches: int) -> None:
    """Once, not for each page: pages never end, and a row is drawn again whenever it is asked for."""
    message = "%s that need more than a row's %s tokens and %s patches are drawn anew (data.too_long=skip)"
    logger.warning(message, kind, f"{tokens:,}", f"{patches:,}")


def conversations(document: Document, config: DatasetConfig) -> Iterator[list[Message]]:
    """What may be said about a page, the longest first: its questions in random order, ever fewer."""
    rng = np.random.default_rng([zlib.crc32(document.transcription.encode())])
    known = lines_to_continue(document, rng) if config.task is Task.CONTINUE else document.questions
    if config.task is Task.QUESTIONS and not known:
        raise DataError(f"{document.kind} have no questions: set task: transcribe or continue")
    if config.task is Task.TRANSCRIBE or not known:  # a page of single words has no line to continue
        yield dialogue([(prompts.READ_PAGE, document.transcription)])
        return
    asked = [(known[i].text, known[i].answer) for i in rng.permutation(len(known))[: config.max_questions]]
    for count in range(len(asked), 0, -1):
        yield dialogue(asked[:count])


def lines_to_continue(document: Document, rng: np.random.Generator) -> list[Question]:
    """For each printed line of several words: its beginning, and what follows. Finding text by its content."""
    questions = []
    for line in document.transcription.splitlines():
        words = line.split(" ")
        if len(words) > 1:
            cut = rng.integers(1, len(words))
            start, rest = " ".join(words[:cut]), " ".join(words[cut:])
            questions.append(Question(prompts.WHAT_FOLLOWS.format(start=start), rest, "rest"))
    return questions


def dialogue(turns: list[tuple[str, str]]) -> list[Message]:
    """Questions and answers about one image, which comes first."""
    messages: list[Message] = []
    for question, answer in turns:
        content = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content if messages else [{"type": "image"}, *content]})
        messages.append({"role": "assistant", "content": answer})
    return messages
