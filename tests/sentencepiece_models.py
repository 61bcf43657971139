"""Small SentencePiece models to test with."""

import io
from pathlib import Path
from typing import Any

import sentencepiece


def train(folder: Path, **options: Any) -> Path:
    """Writes `tokenizer.model`, trained on a few words, into `folder`; `options` are SentencePiece's own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "hello world total 123.45"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder
