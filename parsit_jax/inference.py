"""ParsitInference: pages and questions in, text out."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from parsit_jax import prompts
from parsit_jax.data.examples import Encoder
from parsit_jax.documents.images import is_pdf, load_image, pages
from parsit_jax.pretrained import Parsit
from vishwamai.chat import Message, encode_prompt
from vishwamai.data.packing import Capacity, Example, collate
from vishwamai.generation.engine import Generation, check_cache_dtype
from vishwamai.generation.prompts import TooLongError, right_aligned
from vishwamai.generation.sampling import Sampling

Page = str | Path | Image.Image


@dataclass(frozen=True)
class Prompt:
    """A conversation to continue, and its images in order."""

    messages: list[Message]
    images: list[Image.Image]


class ParsitInference:
    """A document model that answers in words.

    `path` is a training run, one of its checkpoints, an exported folder or a Hugging Face id; `cache_dtype` "int8" or
    "float8_e4m3fn" keeps past keys and values in 8 bits (see `Generation`). All methods take `temperature` (0 is
    greedy), `top_p`, `max_new_tokens` and `seed`, and return `str`, `answer_batch` one for each question.

    Raises:
        ConfigError: no such model, or weights of another one.
        CheckpointError: a run without a complete checkpoint, or a damaged one.
        FileNotFoundError: no tokenizer beside the weights.
        ImageError: a page that can't be read.
        TooLongError: conversations whose images and words fill the model's context.
        ValueError: a conversation of another form, or another cache_dtype.
    """

    def __init__(self, path: str | Path, dtype: str = "float32", cache_dtype: str | None = None):
        check_cache_dtype(cache_dtype)
        self.cache_dtype = cache_dtype
        self.model = Parsit.from_pretrained(path, dtype)
        trained = self.model.experiment
        self.encoder = Encoder.of(self.model.config, self.model.tokenizer, trained and trained.data.image_size)
        self._rows = 1  # the most prompts answered at once: fewer are padded to as many, so that nothing compiles anew

    def answer_question(self, page: Page, question: str, **sampling: Any) -> str:
        """The answer to a question about one page image."""
        return self._answer([ask(page, question)], **sampling)[0]

    def extract_text(self, page: Page, **sampling: Any) -> str:
        """All text of a page, or of every page of a PDF, in reading order."""
        return self.analyze_document(page, prompts.READ_PAGE, **sampling)

    def analyze_document(
        self, page: Page, question: str | None = None, pages: Sequence[int] | None = None, **sampling: Any
    ) -> str:
        """What a page holds, or the answer to `question`; of a PDF for each of its `pages` (from 1; None: all).

        Several pages come back as sections headed `Page N`.
        """
        question = question or prompts.ANALYZE
        answers = [
            (number, self._answer([ask(image, question)], **sampling)[0]) for number, image in page_images(page, pages)
        ]
        if len(answers) == 1:
            return answers[0][1]
        return "\n\n".join(f"Page {number}\n{text}" for number, text in answers)

    def chat(self, messages: str | Sequence[Message], image_path: Page | None = None, **sampling: Any) -> str:
        """The assistant's next turn.

        `messages` are those of Transformers' chat templates: `{"role", "content"}`, where content is text or a list of
        `{"type": "text", "text": ...}` and `{"type": "image", "image": path or PIL image}`. Or one question as text,
        with the page that it is about in `image_path`.
        """
        if isinstance(messages, str):
            prompt = ask(image_path, messages) if image_path is not None else Prompt([_user(messages)], [])
        elif image_path is not None:
            raise ValueError("image_path goes with a question as text; in messages, images are items of the content")
        else:
            prompt = open_images(messages)
        return self._answer([prompt], **sampling)[0]

    def answer_batch(self, images: Sequence[Page], questions: Sequence[str], **sampling: Any) -> list[str]:
        """One answer for each pair of page and question, all at once."""
        return self._answer([ask(page, text) for page, text in zip(images, questions, strict=True)], **sampling)

    def _answer(
        self,
        prompts: list[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        if not prompts:
            return []
        examples = [self._example(prompt) for prompt in prompts]
        self._rows = max(self._rows, len(examples))
        tokenizer, config = self.model.tokenizer, self.model.config.text
        lengths = [len(example.tokens) for example in examples]
        sizes = f"({self.encoder.layout.tokens:,} an image), the context holds {config.max_position_embeddings:,}"
        too_long = {
            row: f"needs {length:,} tokens {sizes}"
            for row, length in enumerate(lengths)
            if length >= config.max_position_embeddings
        }
        if too_long:
            raise TooLongError(too_long, "ask less, or about fewer or smaller images")
        longest = max(lengths)
        patches = max(example.size[1] for example in examples)
        room = Capacity(longest, patches, self.encoder.layout if patches else None)
        filled = examples + examples[:1] * (self._rows - len(examples))
        generation = Generation(
            self.model.graph,
            self.model.parameters,
            right_aligned(collate([[example] for example in filled], room)),
            max_new_tokens=min(max_new_tokens, config.max_position_embeddings - longest),
            end_ids=tokenizer.eos_token_ids,
            pad_id=tokenizer.pad_token_id or 0,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            dtype=self.model.dtype,
            cache_dtype=self.cache_dtype,
        )
        generation.advance(max_new_tokens)
        answers = generation.answers[: len(examples)]
        return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    def _example(self, prompt: Prompt) -> Example:
        counts = [self.encoder.layout.tokens] * len(prompt.images)
        encoded = encode_prompt(prompt.messages, self.model.tokenizer, image_tokens=counts)
        weights = np.zeros(len(encoded.tokens), np.float32)
        images = tuple(self.encoder.patches(image) for image in prompt.images)
        return Example(encoded.tokens, weights, encoded.feature_index, images)


load_model = ParsitInference  # by the name that users of the earlier Parsit know


def ask(page: Page, question: str) -> Prompt:
    """One question about one page."""
    return Prompt([_user([{"type": "image"}, {"type": "text", "text": question}])], [load_image(page)])


def open_images(messages: Sequence[Message]) -> Prompt:
    """Messages with their image items opened. Raises ValueError for an item that names no image."""
    images, opened = [], []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            opened.append(message)  # a text; what is neither is refused where the conversation is rendered
            continue
        items = []
        for item in content:
            if isinstance(item, Mapping) and item.get("type") == "image":
                if item.get("image") is None:
                    raise ValueError(f"message {number} has an image item without `image`: give a path or a PIL image")
                images.append(load_image(item["image"]))
                item = {"type": "image"}
            items.append(item)
        opened.append({**message, "content": items})
    return Prompt(opened, images)


def page_images(page: Page, numbers: Sequence[int] | None) -> Iterator[tuple[int, Image.Image]]:
    """The page images of a file by number, drawn one at a time.

    Raises ImageError, and ValueError for page numbers of a single image; both before a page is drawn.
    """
    if not isinstance(page, Image.Image) and Path(page).is_file() and is_pdf(page):
        drawn = zip(pages(page, numbers), itertools.count(1) if numbers is None else numbers, strict=False)
        return ((number, image) for image, number in drawn)
    if numbers is not None and list(numbers) != [1]:
        raise ValueError(f"pages={list(numbers)} were asked for, but {page} is an image: it has page 1 only")
    return iter([(1, load_image(page))])


def _user(content: str | list[dict[str, Any]]) -> Message:
    return {"role": "user", "content": content}
