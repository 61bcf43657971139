"""The two tokenizer libraries behind `VishwamAITokenizer`, brought to one shape.

A backend encodes text in two ways. `encode` reads added tokens (`<|im_end|>`) in the text as tokens;
`encode_plain` reads the same characters as ordinary text, whatever they spell (`continued`: other text stands
before it). Both give ids and, for each id, the range of characters that it came from.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class AddedToken:
    """A token outside the learned vocabulary. `skip_special_tokens` leaves the `special` ones out."""

    id: int
    special: bool


def added_token_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds added tokens in a text, the longest first; it never matches if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in longest_first) or r"(?!)")


def is_markup(text: str) -> bool:
    """Whether a token is written as those that structure a text are, like `<|im_end|>`."""
    return text.startswith("<|") and text.endswith("|>")


class HuggingFaceBackend:
    """A `tokenizer.json`, as the `tokenizers` library reads it."""

    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare `Exception` for whatever is wrong with the file
            raise ValueError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()  # a stored training-time length would cut texts in silence
        self._tokenizer.no_padding()
        # The same model without added tokens: the two share the vocabulary, so this costs no memory.
        self._plain = tokenizers.Tokenizer(self._tokenizer.model)
        if self._tokenizer.normalizer is not None:
            self._plain.normalizer = self._tokenizer.normalizer
        if self._tokenizer.pre_tokenizer is not None:
            self._plain.pre_tokenizer = self._tokenizer.pre_tokenizer
        self.added_tokens = {
            token.content: AddedToken(id, token.special)
            for id, token in sorted(self._tokenizer.get_added_tokens_decoder().items())
        }
        self._text_of = {token.id: text for text, token in self.added_tokens.items()}
        self.special_tokens: dict[str, str] = {}  # tokenizer.json doesn't say which one is the end
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], Offsets]:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def encode_plain(self, text: str, continued: bool = False) -> tuple[list[int], Offsets]:
        ids, offsets, begin = [], [], 0
        while begin < len(text):
            encoding = self._plain.encode(text[begin:], add_special_tokens=False)
            end = begin + self._first_added(encoding, text[begin:])
            if end < len(text):
                encoding = self._plain.encode(text[begin:end], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(start + begin, stop + begin) for start, stop in encoding.offsets]
            begin = end
        return ids, offsets

    def _first_added(self, encoding: tokenizers.Encoding, text: str) -> int:
        """Where to break `text` so that its first added token falls apart, or its length.

        Some vocabularies hold added tokens as ordinary pieces too, which the model then finds by itself.
        """
        for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            added = self._text_of.get(id)
            if added is not None and (self.added_tokens[added].special or added == text[start:stop]):
                return start + 1
        return len(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, id: int) -> str | None:
        return self._tokenizer.id_to_token(id)


class SentencePieceBackend:
    """A SentencePiece `*.model`.

    Its control symbols (`<s>`) and user-defined symbols (`<|im_start|>`) are the added tokens. SentencePiece
    itself never finds the former in a text and always the latter; here `encode` finds both and `encode_plain`
    neither.
    The space that SentencePiece puts before a text is not put behind an added token.
    """

    def __init__(self, path: Path, add_bos: bool = False, add_eos: bool = False):
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
            self._vocabulary = sp = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except (DecodeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
        self.added_tokens = {
            piece.piece: AddedToken(id, piece.type == _Piece.CONTROL or is_markup(piece.piece))
            for id, piece in enumerate(model.pieces)
            if piece.type in (_Piece.CONTROL, _Piece.USER_DEFINED)
        }
        self._text_of = {token.id: text for text, token in self.added_tokens.items()}
        self._pattern = added_token_pattern(self.added_tokens)
        self._prefix = [sp.bos_id()] if add_bos and sp.bos_id() >= 0 else []
        self._suffix = [sp.eos_id()] if add_eos and sp.eos_id() >= 0 else []
        ids = {
            "bos_token": sp.bos_id(),
            "eos_token": sp.eos_id(),
            "pad_token": sp.pad_id(),
            "unk_token": sp.unk_id(),
        }
        self.special_tokens = {key: sp.id_to_piece(id) for key, id in ids.items() if id >= 0}
        self.size = sp.get_piece_size()
        # The same model, finding no symbols: for the start of a text, and for what follows an added token.
        for piece in model.pieces:
            if piece.type == _Piece.USER_DEFINED:
                piece.type = _Piece.UNUSED
        self._first = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        model.normalizer_spec.add_dummy_prefix = False
        self._rest = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], Offsets]:
        prefix, suffix = (self._prefix, self._suffix) if add_special_tokens else ([], [])
        ids, offsets = encode_around_added_tokens(self, text, list(self._pattern.finditer(text)))
        return prefix + ids + suffix, [(0, 0)] * len(prefix) + offsets + [(len(text), len(text))] * len(suffix)

    def encode_plain(self, text: str, continued: bool = False) -> tuple[list[int], Offsets]:
        mapping = (self._rest if continued else self._first).encode_as_offset_mapping(text)
        return list(mapping["ids"]), list(mapping["offsets"])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        texts, start = [], 0
        for index in [*(index for index, id in enumerate(ids) if id in self._text_of), len(ids)]:
            run = [id for id in ids[start:index] if id < self.size]
            texts.append((self._rest if start else self._first).decode(run))
            text = self._text_of[ids[index]] if index < len(ids) else ""
            if text and not (skip_special_tokens and self.added_tokens[text].special):
                texts.append(text)
            start = index + 1
        return "".join(texts)

    def token_to_id(self, token: str) -> int | None:
        id = self._vocabulary.piece_to_id(token)
        return id if self._vocabulary.id_to_piece(id) == token else None

    def id_to_token(self, id: int) -> str | None:
        return self._vocabulary.id_to_piece(id) if 0 <= id < self.size else None


def encode_around_added_tokens(
    backend: HuggingFaceBackend | SentencePieceBackend, text: str, tokens: Sequence[re.Match[str]]
) -> tuple[list[int], Offsets]:
    """Ids of `text` in which the matches `tokens` are added tokens and all the rest is ordinary text."""
    ids, offsets, start = [], [], 0
    for token in [*tokens, None]:
        end = token.start() if token else len(text)
        if end > start:
            run_ids, run_offsets = backend.encode_plain(text[start:end], continued=start > 0)
            ids += run_ids
            offsets += [(s + start, e + start) for s, e in run_offsets]
        if token:
            ids.append(backend.added_tokens[token.group()].id)
            offsets.append(token.span())
            start = token.end()
    return ids, offsets
