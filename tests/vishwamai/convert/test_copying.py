"""Copies by blocks and threads are copies."""

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from vishwamai.convert.copying import THREADED_BYTES, contiguous, copy_into, same_bits

SHAPES = [(), (0, 4), (7,), (THREADED_BYTES,), (5, 33), (1030, 771), (3, 701, 517)]
ORDERS = {"as it lies": lambda x: x, "turned": lambda x: x.swapaxes(-1, -2), "strided": lambda x: x[::2, ::-1]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "shape, order", [(shape, order) for shape in SHAPES for order in ORDERS if len(shape) > 1 or order == "as it lies"]
)
def test_every_number_arrives(dtype, shape, order):
    array = ORDERS[order](np.random.default_rng(0).normal(size=shape).astype(dtype))
    assert_array_equal(contiguous(array), array, strict=True)
    assert contiguous(array).flags.c_contiguous
    for to in (np.float32, ml_dtypes.bfloat16):
        out = np.full(array.shape, np.nan, to)
        copy_into(out, array)
        assert_array_equal(out, array.astype(to))


def test_bits_are_compared_to_the_last_one():
    a = np.random.default_rng(0).normal(size=(1030, 771)).astype(np.float32)
    assert same_bits(a, a.copy()) and same_bits(a.T, a.T.copy())
    b = a.copy()
    b[-1, -1] = np.nextafter(b[-1, -1], np.float32(9))
    assert not same_bits(a, b) and not same_bits(a, a.astype(np.float16)) and not same_bits(a, a[:-1])
    assert same_bits(np.array([np.nan]), np.array([np.nan])) and not same_bits(np.array([0.0]), np.array([-0.0]))
