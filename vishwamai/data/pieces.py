"""Documents -> pieces that fit a row, and nothing lost: what pre-training learns from."""

import logging
from array import array
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from vishwamai.data.documents import Documents
from vishwamai.data.lengths import kept
from vishwamai.data.packing import Example
from vishwamai.data.sources import DataError
from vishwamai.tokenizer import VishwamAITokenizer

# In the place of a number of tokens, for documents that give no piece.
_EMPTY, _HELD_OUT = 0, -1

logger = logging.getLogger(__name__)


def encode_piece(text: str, start: int, end: int, tokenizer: VishwamAITokenizer) -> Int32[np.ndarray, " T"]:
    """The tokens of a document's characters [start, end): ordinary text, whatever it spells.

    The document begins with the tokenizer's bos (where it has one) and ends with its eos; a piece out of its middle
    has neither.
    """
    ids = tokenizer.encode_plain(text[start:end], continued=start > 0)
    before = [tokenizer.bos_token_id] if start == 0 and tokenizer.bos_token_id is not None else []
    after = [tokenizer.eos_token_id] if end == len(text) and tokenizer.eos_token_id is not None else []
    return np.asarray([*before, *ids, *after], np.int32)


def encode_document(text: str, tokenizer: VishwamAITokenizer) -> Int32[np.ndarray, " T"]:
    """All tokens of a document, with the tokenizer's bos and eos around them."""
    return encode_piece(text, 0, len(text), tokenizer)


def cut(text: str, tokenizer: VishwamAITokenizer, length: int | None) -> list[tuple[int, int, int]]:
    """(first character, end, tokens) of pieces of at most `length` tokens; None: all is one piece.

    Cut between tokens of the whole text, so the pieces' tokens are those of the whole wherever the tokenizer reads
    a part as it reads the whole (BPE and unigram models do, but not where they drop spaces). All characters are there.
    Raises ValueError where not even one character fits.
    """
    whole = len(encode_document(text, tokenizer))
    if length is None or whole <= length:
        return [(0, len(text), whole)]
    _, offsets = tokenizer.encode_with_offsets(text, [(0, len(text))])
    starts = np.asarray([start for start, _ in offsets] + [len(text)])
    pieces: list[tuple[int, int, int]] = []
    start = 0
    while start < len(text):
        room = length - (start == 0 and tokenizer.bos_token_id is not None)
        stop = int(np.searchsorted(starts, start)) + room
        end = int(starts[min(stop, len(offsets))])
        if end <= start:
            end = int(starts[np.searchsorted(starts, start, side="right")])
        while (tokens := len(encode_piece(text, start, end, tokenizer))) > length:
            if end == start + 1:
                raise ValueError(f"character {start} alone needs more than a row's {length} tokens")
            # The last piece has eos too; and bytes of characters without a token can have one place in common.
            end = start + max(1, (end - start) * length // tokens)
            before = int(starts[np.searchsorted(starts, end, side="right") - 1])
            end = before if before > start else end
        pieces.append((start, end, tokens))
        start = end
    return pieces


@dataclass(frozen=True)
class Piece:
    """The characters [start, end) of a document."""

    documents: Documents
    document: int
    start: int
    end: int

    @property
    def where(self) -> str:
        """What errors call it."""
        return f"{self.documents.where(self.document)} (characters {self.start:,} to {self.end:,})"

    def example(self, tokenizer: VishwamAITokenizer) -> Example:
        """All its tokens, learned but for the first. Raises DataError."""
        tokens = encode_piece(self.documents[self.document], self.start, self.end, tokenizer)
        return Example(tokens, np.ones(len(tokens), np.float32))


class Pieces(Sequence[Piece]):
    """The pieces of documents, in order. `index`: (document, first character, end, tokens) of each."""

    def __init__(self, documents: Documents, index: Int64[np.ndarray, "N 4"]):
        self._documents, self._index = documents, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Piece:
        return Piece(self._documents, *self._index[number, :3].tolist())

    @property
    def lengths(self) -> Int32[np.ndarray, "N 2"]:
        """(tokens, patches) of each."""
        return np.stack([self._index[:, 3], np.zeros(len(self), np.int64)], axis=1).astype(np.int32)


def open_pieces(
    documents: Documents, tokenizer: VishwamAITokenizer, length: int | None, held_out: Documents | None = None
) -> Pieces:
    """The pieces of `documents` of at most `length` tokens (None: whole documents).

    Texts that stand in `held_out` too, and documents without text, give none, and the log says how many. The places
    of the cuts are kept as `length_index` keeps lengths: on the first start every document is tokenised. Raises
    DataError for a document that can't be read or is no Unicode, and when no piece is left.
    """
    key = ["pieces", documents.fingerprint, length, held_out and held_out.fingerprint]
    index = kept(key, tokenizer, lambda: _index(documents, tokenizer, length, set(held_out or ())))
    for kind, level, what in (
        (_EMPTY, logging.WARNING, "without text, left out"),
        (_HELD_OUT, logging.INFO, "held out, not learned"),
    ):
        if len(found := index[index[:, 3] == kind, 0]):
            first = documents.where(int(found[0]))
            logger.log(level, "%s: %s of %s documents; the first is %s", what, len(found), len(documents), first)
    index = index[index[:, 3] > 0]
    if not len(index):
        raise DataError(
            f"none of the {len(documents)} documents can be learned from; the first is {documents.where(0)}"
        )
    return Pieces(documents, index)


def _index(
    documents: Documents, tokenizer: VishwamAITokenizer, length: int | None, held_out: AbstractSet[str]
) -> Int64[np.ndarray, "N 4"]:
    logger.info("counting the tokens of %s documents", len(documents))
    rows = array("q")  # 32 bytes a piece, where a list of tuples has 200
    for number, text in enumerate(documents):
        if text in held_out or not text.strip():
            rows.extend((number, 0, 0, _HELD_OUT if text in held_out else _EMPTY))
            continue
        try:
            for piece in cut(text, tokenizer, length):
                rows.extend((number, *piece))
        except ValueError as error:
            raise DataError(f"{documents.where(number)}: {error}") from error
    return np.asarray(rows, np.int64).reshape(-1, 4)
