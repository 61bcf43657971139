"""How long every example of a pool is, counted once and kept."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from vishwamai.data.sources import Record, Records
from vishwamai.tokenizer import TOKENIZER_FILES, VishwamAITokenizer

# Part of every key: raise it when the same file, tokenizer and image size come to have other lengths.
_FORMAT = 1

logger = logging.getLogger(__name__)


def length_index(
    records: Records, measure: Callable[[Record], tuple[int, int]], tokenizer: VishwamAITokenizer, key: Any
) -> Int32[np.ndarray, "N 2"]:
    """(tokens, patches) of every record; `key` is what else `measure` depends on.

    Kept in `$XDG_CACHE_HOME/vishwamai/lengths` under a hash of files (path, size, time), tokenizer, key. So the
    text is tokenised twice: here, once for all runs, and when a batch is made. Raises what `measure` raises.
    """

    def count() -> Int32[np.ndarray, "N 2"]:
        logger.info("counting the tokens of %s examples", len(records))
        return np.asarray([measure(record) for record in records], np.int32)

    return kept([records.fingerprint, key], tokenizer, count)


def kept(key: Any, tokenizer: VishwamAITokenizer, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` returns, from the cache where it was made before for the same `key` (JSON) and tokenizer."""
    parts = json.dumps([_FORMAT, key, _tokenizer_hash(tokenizer)])
    path = _folder() / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.npy"
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):  # not there, or damaged: counted anew
        pass
    array = make()
    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a run that is killed, or one beside it, never sees half a file.
        with part.open("wb") as file:
            np.save(file, array)
        part.replace(path)
    except OSError as error:
        logger.warning("token counts are not kept for the next run: %s", error)
        with suppress(OSError):
            part.unlink()
    return array


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vishwamai" / "lengths"


def _tokenizer_hash(tokenizer: VishwamAITokenizer) -> str:
    digest = hashlib.sha256()
    for pattern in TOKENIZER_FILES:
        for path in sorted(tokenizer.folder.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
