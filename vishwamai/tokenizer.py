"""One interface over Hugging Face `tokenizers` (`tokenizer.json`) and SentencePiece (`*.model`)."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vishwamai.tokenizer_backends import (
    AddedToken,
    HuggingFaceBackend,
    Offsets,
    SentencePieceBackend,
    added_token_pattern,
    encode_around_added_tokens,
)

# All that belongs to a tokenizer in a Hugging Face folder; `save_pretrained` carries these as they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
)
# What ends an answer besides the declared end: the first ends Qwen's turns, the second its documents.
_ENDS = ("<|im_end|>", "<|endoftext|>")


class VishwamAITokenizer:
    """Text to token ids and back, by a checkpoint's own tokenizer. Open one with `from_pretrained`.

    Attributes:
        folder: where the files are.
        config: what `tokenizer_config.json` says (empty if there is none).
        added_tokens: text -> `AddedToken(id, special)` of every token outside the learned vocabulary.
        special_tokens: the text of each declared `bos_token`, `eos_token`, `pad_token`, `unk_token`.
        chat_template: the Jinja source of the checkpoint's chat template, or None.
        vocab_size: number of ids, added tokens included.
        bos_token_id, eos_token_id, pad_token_id: ids of the declared special tokens, or None.
        eos_token_ids: every id that ends an answer: the declared end, `<|im_end|>` and `<|endoftext|>`.
    """

    def __init__(self, backend: HuggingFaceBackend | SentencePieceBackend, folder: Path, config: dict[str, Any]):
        self._backend = backend
        self.folder = folder
        self.config = config
        self.added_tokens: dict[str, AddedToken] = backend.added_tokens
        self._special_ids = {token.id for token in backend.added_tokens.values() if token.special}
        self.added_token_pattern = added_token_pattern(backend.added_tokens)
        self.chat_template = _chat_template(folder, config)
        self.vocab_size = backend.size
        names = {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        # The older form is {"content": "<s>", "lstrip": false, ...}.
        names = {key: name["content"] if isinstance(name, dict) else name for key, name in names.items()}
        self.special_tokens = backend.special_tokens | {key: name for key, name in names.items() if name}
        ids = {key: backend.token_to_id(name) for key, name in self.special_tokens.items()}
        # Transformers would add tokens that only the config names; here they would be read as text, in silence.
        declared = {token["content"]: int(id) for id, token in config.get("added_tokens_decoder", {}).items()}
        for name in [*declared, *self.special_tokens.values()]:
            id = backend.token_to_id(name)
            if id is None or id != declared.get(name, id):
                raise ValueError(
                    f"the config of the tokenizer in {folder} names the token {name!r} (id {declared.get(name)}), "
                    f"the vocabulary has {'none such' if id is None else f'it as id {id}'}: open the folder with "
                    "Transformers' AutoTokenizer and save it, which writes both into tokenizer.json"
                )
        self.bos_token_id = ids.get("bos_token")
        self.eos_token_id = ids.get("eos_token")
        self.pad_token_id = ids.get("pad_token")
        ends = [self.eos_token_id, *(backend.added_tokens[end].id for end in _ENDS if end in backend.added_tokens)]
        self.eos_token_ids = tuple(dict.fromkeys(id for id in ends if id is not None))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VishwamAITokenizer":
        """Opens the tokenizer in `folder`, or in its `tokenizer/` as runs have it.

        Raises:
            FileNotFoundError: neither `tokenizer.json` nor a `*.model` is there.
            ValueError: a file is there and can't be read, there are several `*.model` files, or the config names
                tokens that the vocabulary doesn't have.
        """
        folder = Path(folder)
        places = [folder, folder / "tokenizer"]
        for place in places:
            config = _read_config(place)
            if (place / "tokenizer.json").is_file():
                return cls(HuggingFaceBackend(place / "tokenizer.json"), place, config)
            models = sorted(place.glob("*.model"))
            if len(models) > 1:
                names = ", ".join(path.name for path in models)
                raise ValueError(f"{place} holds several SentencePiece models ({names}): keep the tokenizer's only")
            if models:
                add_bos, add_eos = config.get("add_bos_token", False), config.get("add_eos_token", False)
                return cls(SentencePieceBackend(models[0], add_bos, add_eos), place, config)
        found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for tokenizer.json and *.model there and in {places[1]}, "
            f"found {found or 'an empty folder'}"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the tokenizer's files to `folder`, byte for byte."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in TOKENIZER_FILES:
            for source in sorted(self.folder.glob(pattern)):
                if source.resolve() != (folder / source.name).resolve():
                    shutil.copyfile(source, folder / source.name)

    def encode(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        """Ids of `text`; added tokens spelled in it become their ids (`encode_plain` does not do that).

        `add_special_tokens`: whether to add what the tokenizer puts around a text (Qwen3's adds nothing).
        `return_tensors`: None for a list, "np" or "jax" for an int32 array `1 T`.
        """
        ids = self._backend.encode(_checked(text), add_special_tokens)[0]
        return ids if return_tensors is None else _as_array([ids], return_tensors)

    def encode_plain(self, text: str, continued: bool = False) -> list[int]:
        """Ids of `text` as ordinary text: `<|im_end|>` in it is ten characters, never the end of a turn.

        `continued`: other text stands before it, so that it gets no space that the tokenizer puts before a text.
        """
        return self._backend.encode_plain(_checked(text), continued)[0]

    def encode_with_offsets(self, text: str, plain: Sequence[tuple[int, int]] = ()) -> tuple[list[int], Offsets]:
        """Ids of `text`, and for each the range of characters that it came from.

        `plain`: ranges of characters, ascending, in which added tokens are read as ordinary text.
        """
        tokens = list(self.added_token_pattern.finditer(blanked(_checked(text), plain)))
        if not plain:
            ids, offsets = self._backend.encode(text, add_special_tokens=False)
            # No more special tokens than the text spells, as normalising full-width characters could make.
            spelled = sum(self.added_tokens[token.group()].special for token in tokens)
            if sum(id in self._special_ids for id in ids) <= spelled:
                return ids, offsets
        return encode_around_added_tokens(self._backend, text, tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids` (a list or a one-dimensional array)."""
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if array.ndim != 1:
            raise ValueError(
                f"decode takes one sequence of ids, found an array of shape {array.shape}: use batch_decode"
            )
        if array.size and not (np.issubdtype(array.dtype, np.integer) and array.min() >= 0):
            raise ValueError(f"token ids are integers from 0, found {array.dtype} values from {array.min()}")
        return self._backend.decode(array.tolist(), skip_special_tokens)

    def batch_encode(
        self, texts: Sequence[str], add_special_tokens: bool = True, return_tensors: str | None = None
    ) -> Any:
        """`encode` of each text: a list of lists, or int32 `B T` padded at the end with `pad_token_id`."""
        rows = [self.encode(text, add_special_tokens) for text in texts]
        return rows if return_tensors is None else _as_array(rows, return_tensors, self.pad_token_id)

    def batch_decode(self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def token_to_id(self, token: str) -> int:
        """The id of a token; a `KeyError` says so if there is none."""
        id = self._backend.token_to_id(token)
        if id is None:
            raise KeyError(f"the tokenizer in {self.folder} has no token {token!r}")
        return id

    def id_to_token(self, id: int) -> str:
        """The token of an id; a `KeyError` says so if there is none."""
        token = self._backend.id_to_token(int(id)) if id >= 0 else None
        if token is None:
            raise KeyError(f"the tokenizer in {self.folder} has no id {id}: its ids are 0 to {self.vocab_size - 1}")
        return token

    def __len__(self) -> int:
        return self.vocab_size


def blanked(text: str, ranges: Iterable[tuple[int, int]]) -> str:
    """`text` with the characters in `ranges` made NUL, so that nothing is found in them."""
    for start, end in ranges:
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has the last word
        path = folder / name
        if path.is_file():
            try:
                config |= json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not valid JSON: {error}") from error
    return config


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"expected a text, found {type(text).__name__}: {text!r:.100}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair at character {error.start}, which is no Unicode"
        ) from error
    return text


def _as_array(rows: list[list[int]], kind: str, pad_id: int | None = None) -> Any:
    if kind not in ("np", "jax"):
        raise ValueError(f'return_tensors is None, "np" or "jax", found {kind!r}')
    lengths = [len(row) for row in rows]
    if pad_id is None and len(set(lengths)) > 1:
        raise ValueError(f"rows of {min(lengths)} to {max(lengths)} tokens need padding, but there is no pad_token")
    array = np.full((len(rows), max(lengths, default=0)), 0 if pad_id is None else pad_id, np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    if kind == "np":
        return array
    import jax.numpy as jnp  # here, so that data workers start without JAX

    return jnp.asarray(array)
