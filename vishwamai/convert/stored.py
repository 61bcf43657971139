"""Tensors in files of one kind or the other: what a header says of each, and how to read it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

# What parameters can be kept in, by safetensors' names: JAX would round F64 to F32.
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file. `read` gives a view of the file, whose pages are fetched when its numbers are used."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
