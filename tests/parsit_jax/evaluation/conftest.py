"""A stand-in for a model, to test the arithmetic of scoring."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from parsit_jax.evaluation.benchmarks import Example


class Oracle:
    """Knows the answers about the pages of `examples`, as `alter` spoils them; other pages get `blank`."""

    def __init__(
        self,
        examples: Iterable[Example],
        *,
        blank: str = "nothing",
        alter: Callable[[Example], str] = lambda example: example.answers[0],
    ):
        self.answers = {(self._key(e.image), e.question): alter(e) for e in examples}
        self.blank = blank
        self.batches: list[tuple[list[Path | Image.Image], list[str]]] = []

    def answer_batch(self, images: Sequence[Path | Image.Image], questions: Sequence[str]) -> list[str]:
        self.batches.append((list(images), list(questions)))
        asked = zip(images, questions, strict=True)
        return [self.answers.get((self._key(image), question), self.blank) for image, question in asked]

    @staticmethod
    def _key(image: Path | Image.Image) -> object:
        return image if isinstance(image, Path) else (image.size, image.convert("L").tobytes())


@pytest.fixture(name="Oracle")
def oracle_type() -> type[Oracle]:
    return Oracle
