"""`--show-batch`: what the model really sees. Decoded text with what is trained on marked, and the images."""

from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from vishwamai.data.batch import Batch
from vishwamai.tokenizer import VishwamAITokenizer


def show_batch(batch: Batch, tokenizer: VishwamAITokenizer, folder: Path, colour: bool, rows: int = 4) -> str:
    """The text of the first rows, and their images written to `folder`.

    Text that is trained on stands between ⟦ and ⟧ (green on a terminal); image tokens are counted, not spelled.
    """
    rows = min(rows, batch.rows)
    lines = [f"batch of {batch.rows} rows; shown: {rows}. Trained on: " + _mark("like this", colour)]
    for row in range(rows):
        used = int(np.count_nonzero(batch.segment_ids[row]))
        trained = int(np.count_nonzero(batch.loss_weights[row]))
        examples = int(batch.segment_ids[row].max())
        capacity = batch.tokens.shape[1]
        lines.append(f"\n== row {row}: {examples} examples, {used} of {capacity} tokens, {trained} trained on")
        for example in range(1, examples + 1):
            lines.append(f"-- example {example}\n{_text(batch, row, example, tokenizer, colour)}")
    written = [path for row in range(rows) for path in _write_images(batch, row, folder)]
    lines += [f"\nimage: {path}" for path in written]
    return "\n".join(lines)


def _text(batch: Batch, row: int, example: int, tokenizer: VishwamAITokenizer, colour: bool) -> str:
    at = np.flatnonzero(batch.segment_ids[row] == example)
    features = batch.feature_index[row, at] >= 0 if batch.feature_index is not None else np.zeros(len(at), bool)
    trained = batch.loss_weights[row, at] > 0
    text = ""
    for (is_image, is_trained), group in groupby(range(len(at)), key=lambda i: (features[i], trained[i])):
        run = list(group)
        if is_image:
            text += f"[{len(run)} image features]"
            continue
        decoded = tokenizer.decode(batch.tokens[row, at[run]].tolist())
        text += _mark(decoded, colour) if is_trained else decoded
    return text


def _mark(text: str, colour: bool) -> str:
    return f"\x1b[1;32m⟦{text}⟧\x1b[0m" if colour else f"⟦{text}⟧"


def _write_images(batch: Batch, row: int, folder: Path) -> list[Path]:
    """PNG files of a row's images, put together again from their patches."""
    if batch.patches is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for image in range(1, int(batch.patch_segment_ids[row].max()) + 1):
        at = np.flatnonzero(batch.patch_segment_ids[row] == image)
        path = folder / f"row{row}_image{image}.png"
        Image.fromarray(assemble(batch.patches[row, at], batch.patch_positions[row, at])).save(path)
        paths.append(path)
    return paths


def assemble(patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint8 H W 3 of one image's patches P C, C in (channel, row, column) order; floats are taken as in [-1, 1]."""
    if patches.dtype != np.uint8:
        patches = np.clip((patches + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
    size = int(round((patches.shape[1] / 3) ** 0.5))
    tall, wide = (positions.max(axis=0) + 1) * size
    page = np.zeros((tall, wide, 3), np.uint8)
    for patch, (y, x) in zip(patches.reshape(-1, 3, size, size), positions * size, strict=True):
        page[y : y + size, x : x + size] = patch.transpose(1, 2, 0)
    return page
