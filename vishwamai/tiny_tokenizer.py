"""A tokenizer of single characters and a few whole words, for models small enough to train in minutes.

`python -m vishwamai.tiny_tokenizer OUT` writes the one of `configs/parsit_tiny.yaml`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from vishwamai.templates import load_template

ALPHABET = "\n" + "".join(map(chr, range(0x20, 0x7F))) + "£€"
# Words of roles and questions only: what is printed on a page stays characters, as the model learns to read.
PIECES = ("system", "user", "assistant", "Read the page.", "What is the ", "What ", "How much ", "is the ")
# Qwen3's added tokens in its order, and whether each is special there.
ADDED_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|box_start|>": True,
    "<|box_end|>": True,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}
# Scores of the unigram model; the segmentation with the largest sum wins. A piece beats its characters, a
# longer piece beats shorter ones, and a byte's name spelled in a text ("<0x41>") never beats its characters.
_PIECE, _CHARACTER, _BYTE = -1.0, -10.0, -10_000.0
_UNKNOWN = "<unk>"  # the library asks for one; with all bytes there, no text ever gives it


def build_tiny_tokenizer(alphabet: str, pieces: Sequence[str], chat_template: str, folder: str | Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which Transformers' `AutoTokenizer` opens too.

    Each character of `alphabet` and each of `pieces` is one token; any other character is its UTF-8 bytes.
    Text comes back exactly from its ids. The added tokens are Qwen3's.

    Raises:
        ValueError: a character or a piece is there twice, or a piece is of one character.
    """
    words = [*alphabet, *pieces]
    if twice := sorted({word for word in words if words.count(word) > 1}):
        raise ValueError(f"alphabet and pieces hold these twice: {twice}")
    if short := [piece for piece in pieces if len(piece) < 2]:
        raise ValueError(f"a piece has two or more characters, found {short}: put single ones into the alphabet")

    vocabulary = [(_UNKNOWN, _BYTE)]
    vocabulary += [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    vocabulary += [(character, _CHARACTER) for character in alphabet]
    vocabulary += [(piece, _PIECE) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for token, special in ADDED_TOKENS.items():
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])

    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(id): {key: getattr(token, key) for key in keys}
        for id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [text for text in list(ADDED_TOKENS)[1:] if ADDED_TOKENS[text]],
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m vishwamai.tiny_tokenizer OUT")
    build_tiny_tokenizer(ALPHABET, PIECES, load_template("qwen3"), sys.argv[1])
