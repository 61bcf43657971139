"""Copies of weights at the speed of the memory: turned ones by blocks, large ones by several threads."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK = 16  # rows of a turned matrix that are written at once: the lines that they touch stay in the cache
THREADED_BYTES = 2**20

_threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="copy")


def copy_into(out: np.ndarray, array: np.ndarray) -> None:
    """`out[...] = array`, rounded to the type of `out`; both of one shape, `array` in any order of memory."""
    if out.dtype == array.dtype and out.itemsize == 2:
        # NumPy holds the interpreter's lock while it copies bfloat16, and copies 16-bit numbers without.
        out, array = out.view(np.uint16), array.view(np.uint16)
    if out.nbytes < THREADED_BYTES or out.ndim < 2:
        return _copy(out, array)
    step = -(-len(out) // _threads._max_workers)
    parts = [slice(start, start + step) for start in range(0, len(out), step)]
    list(_threads.map(lambda part: _copy(out[part], array[part]), parts))


def _copy(out: np.ndarray, array: np.ndarray) -> None:
    if array.ndim < 2 or array.strides[-1] <= array.strides[-2]:
        out[...] = array
        return
    for start in range(0, array.shape[-1], BLOCK):
        part = (..., slice(start, start + BLOCK))
        out[part] = array[part]


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order; itself where it is."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal to the last bit; both are read in parts."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = (contiguous(x).reshape(-1).view(np.uint8) for x in (a, b))
    parts = (slice(start, start + THREADED_BYTES) for start in range(0, a.size, THREADED_BYTES))
    return all(np.array_equal(a[part], b[part]) for part in parts)
