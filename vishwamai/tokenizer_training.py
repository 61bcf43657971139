"""Trains a SentencePiece model on documents, and writes it as a folder that Transformers opens too."""

import io
import json
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from vishwamai.config import ConfigError
from vishwamai.data.sources import DataError
from vishwamai.templates import load_template

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# A symbol's name or a byte's ("<0x41>") spelled in a text never beats its characters.
_NEVER = -10_000.0
_SPACE = "\u2581"  # as SentencePiece writes it

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


class ModelType(StrEnum):
    """How pieces are found: Kudo 2018 (unigram), or byte pair encoding (Sennrich et al. 2016)."""

    UNIGRAM = "unigram"
    BPE = "bpe"


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, folder: str | Path, model_type: ModelType = ModelType.UNIGRAM
) -> None:
    """Writes `tokenizer.model`, the same model as `tokenizer.json`, `tokenizer_config.json` and a chat template.

    Text comes back exactly from its ids: nothing is normalised, and what has no piece is its UTF-8 bytes (so is a
    line break: pieces are learned from lines). Bos is put before a text. The same documents give the same bytes; all
    of them are in memory meanwhile.

    Raises:
        ConfigError: a vocabulary that is too large or too small for the text; a folder that isn't empty.
        DataError: no text.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and not empty: name another folder, or remove it")
    lines = [line for text in documents for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError("the input holds no text to learn pieces from")
    model = _trained(lines, vocab_size, model_type)
    tokenizer = as_tokenizers(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(id): {"content": token.content, "special": True} for id, token in sorted(added.items())
        },
        "additional_special_tokens": list(CHAT_TOKENS),
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(load_template("qwen3"), encoding="utf-8")


def _trained(lines: Sequence[str], vocab_size: int, model_type: ModelType) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type.value,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # longer lines would be left out in silence
            num_threads=16,  # whatever the machine has: partial sums are added in the same order
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=list(CHAT_TOKENS),
            minloglevel=2,
        )
    except RuntimeError as error:
        if high := re.search(r"too high .* <= (\d+)", str(error)):
            raise ConfigError(f"the text gives at most {high[1]} pieces, asked for {vocab_size}: lower it") from None
        if low := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise ConfigError(
                f"symbols, bytes and the text's characters alone are {low[1]} pieces, asked for {vocab_size}: raise it"
            ) from None
        raise
    return model.getvalue()


def as_tokenizers(model: bytes) -> Tokenizer:
    """A SentencePiece model that was trained here, as the `tokenizers` library computes it.

    Equal ids, but where a unigram model finds two ways equally likely ("*" * 18 as 16 and 2, or 2 and 16).
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = [(piece.piece, piece.score if piece.type == _Piece.NORMAL else _NEVER) for piece in proto.pieces]
    if proto.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.UNIGRAM:
        unk = proto.trainer_spec.unk_id
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unk, byte_fallback=True))
    else:
        ids = {piece: id for id, (piece, _) in enumerate(pieces)}
        merges = _merges([piece.piece for piece in proto.pieces if piece.type == _Piece.NORMAL])
        tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    for piece in proto.pieces:
        if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN):
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=True)])
    bos = (BOS, proto.trainer_spec.bos_id)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS} $B", [bos])
    return tokenizer


def _merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair that makes a piece, the pieces learned first (by SentencePiece: the best) first."""
    known = set(pieces)
    return [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
