"""Perplexity of documents of any length, by windows that overlap.

Each token is predicted exactly once. A document that is longer than the context is read in windows: the first one
predicts all it holds, each next one the `stride` tokens behind those (the last one what is left), and reaches as far
back as the context does, so a token has at least context - stride tokens before it wherever the document has them.
That is "Perplexity of fixed-length models" in the Transformers documentation, but for the last window, which is as
long as the others; with stride = context the windows are those of lm_eval's `loglikelihood_rolling`.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vishwamai.data.conversations import check_vocabulary
from vishwamai.data.sources import DataError
from vishwamai.evaluation.scoring import Row, score
from vishwamai.pretrained import VishwamAI
from vishwamai.tokenizer import VishwamAITokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted; lower is better.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token. Comparable where the tokenizer is the same.
        bits_per_byte: negative log2-likelihood of the text per byte of UTF-8. Comparable between tokenizers.
        word_perplexity: exp of the negative log-likelihood per word, words being what stands between white space;
            None for a text without words. Both are None where they are more than a float holds.
        documents, tokens, words, bytes: what was scored; tokens are those that were predicted.
        empty_documents: documents without any text (or, without a prefix token, of a single token), which were left
            out.
        context, stride: of the windows.
    """

    perplexity: float | None
    bits_per_byte: float
    word_perplexity: float | None
    documents: int
    tokens: int
    words: int
    bytes: int
    empty_documents: int
    context: int
    stride: int


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, scored): of the tokens `start:end` of a text of `length` tokens the last `scored` are predicted.

    A text's first token is given, not predicted. A window has up to context + 1 tokens: the last one is no input.
    Raises ValueError for a stride that leaves a gap, or no token.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride}: expected 1 to the context, {context}")
    done, step = 1, context
    while done < length:
        end = min(length, done + step)
        yield max(0, end - context - 1), end, end - done
        done, step = end, stride


def prefix_token(tokenizer: VishwamAITokenizer) -> int | None:
    """What a text's first token is predicted from: the token that begins texts, else the one that ends them."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def perplexity(
    model: VishwamAI,
    documents: Sequence[str],
    *,
    stride: int | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """The perplexity of documents, each on its own.

    A document's first token is predicted from `prefix_token`, as in lm_eval; a tokenizer that has none leaves it out,
    and its bytes and words count all the same. Special tokens spelled in a document are ordinary text. `stride` is
    half the context by default. `on_progress` is called with (windows scored, windows in all).

    Raises:
        ConfigError: a tokenizer that is larger than the model's vocabulary.
        DataError: no document has a token to predict.
        ValueError: a stride that is out of range.
    """
    tokenizer, context = model.tokenizer, model.config.max_position_embeddings
    check_vocabulary(tokenizer, model.config)
    stride = max(1, context // 2) if stride is None else stride
    prefix = prefix_token(tokenizer)
    before = [] if prefix is None else [prefix]
    rows: list[Row] = []
    scored_documents, empty, words, size = 0, 0, 0, 0
    for document in documents:
        tokens = np.asarray(before + tokenizer.encode_plain(document), np.int32)
        of_document = [Row(tokens[start:end], scored) for start, end, scored in windows(len(tokens), context, stride)]
        if not of_document:
            empty += 1
            continue
        rows += of_document
        scored_documents += 1
        words += len(document.split())
        size += len(document.encode())
    if empty:
        logger.warning("%d of %d documents are empty and were left out", empty, scored_documents + empty)
    if not rows:
        raise DataError(f"nothing to score: {empty} documents, all of them empty")
    nats = -sum(found.log_probability for found in score(model, rows, batch_size, on_progress))
    tokens = sum(row.scored for row in rows)
    return Perplexity(
        perplexity=_exponential(nats, tokens),
        bits_per_byte=nats / math.log(2) / size,
        word_perplexity=_exponential(nats, words),
        documents=scored_documents,
        tokens=tokens,
        words=words,
        bytes=size,
        empty_documents=empty,
        context=context,
        stride=stride,
    )


def _exponential(nats: float, count: int) -> float | None:
    """exp(nats / count), where there is such a number."""
    return math.exp(nats / count) if count and nats / count < math.log(sys.float_info.max) else None
