"""Masks against small arrays written by hand, and what a Mask refuses."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, attention, decode_attention
from kernels.attention.mask import all_see_themselves, key_range, visible
from kernels.backends import Backend

HAND_WRITTEN = {
    "causal": (
        Mask(causal=True),
        ["1000", "1100", "1110", "1111"],
    ),
    "window of two": (
        Mask(causal=True, window=2),
        ["1000", "1100", "0110", "0011"],
    ),
    "window wider than the text": (
        Mask(causal=True, window=9),
        ["1000", "1100", "1110", "1111"],
    ),
    "prefix of three": (
        Mask(causal=True, prefix_length=3),
        ["1110", "1110", "1110", "1111"],
    ),
    "window and prefix": (
        Mask(causal=True, window=1, prefix_length=1),
        ["1000", "1100", "1010", "1001"],
    ),
    "packed, padded": (
        Mask(causal=True, q_segment_ids=np.array([[1, 1, 2, 0]])),
        ["1000", "1100", "0010", "0000"],
    ),
    "segments, both ways": (
        Mask(q_segment_ids=np.array([[1, 2, 2, 0]]), kv_segment_ids=np.array([[2, 1, 0, 2]])),
        ["0100", "1001", "1001", "0000"],
    ),
    "prefix inside a segment only": (
        Mask(causal=True, prefix_length=3, q_segment_ids=np.array([[1, 1, 2, 2]])),
        ["1100", "1100", "0010", "0011"],
    ),
    "block": (
        Mask(causal=True, block_ids=np.array([[0, 5, 5, 0]])),
        ["1000", "1110", "1110", "1111"],
    ),
    "block across segments": (
        Mask(causal=True, block_ids=np.array([[5, 5, 5, 5]]), q_segment_ids=np.array([[1, 1, 2, 2]])),
        ["1100", "1100", "0011", "0011"],
    ),
    "block that a window does not cut": (
        Mask(causal=True, window=1, block_ids=np.array([[0, 5, 5, 0]])),
        ["1000", "0110", "0110", "0001"],
    ),
    "key length": (
        Mask(kv_length=2),
        ["1100", "1100", "1100", "1100"],
    ),
    "key length of nothing": (
        Mask(kv_length=np.array([0])),
        ["0000", "0000", "0000", "0000"],
    ),
    "two cached": (
        Mask(causal=True, q_offset=2),
        ["1110", "1111", "1111", "1111"],
    ),
    "before the first key": (
        Mask(causal=True, q_offset=np.array([-2])),
        ["0000", "0000", "1000", "1100"],
    ),
    "before the first key, known when tracing": (
        Mask(causal=True, q_offset=-2),
        ["0000", "0000", "1000", "1100"],
    ),
    "window beyond the last key": (
        Mask(causal=True, window=2, q_offset=3),
        ["0011", "0001", "0000", "0000"],
    ),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written(name):
    mask, rows = HAND_WRITTEN[name]
    expected = np.array([[digit == "1" for digit in row] for row in rows])
    np.testing.assert_array_equal(np.broadcast_to(visible(mask, 0, 4, 0, 4), (1, 4, 4))[0], expected)
    np.testing.assert_array_equal(np.broadcast_to(visible(mask, 1, 2, 1, 3), (1, 2, 3))[0], expected[1:3, 1:4])
    assert expected.any(axis=1).all() or not all_see_themselves(mask, 4, 4)
    # What is skipped without looking holds nothing.
    for start in range(4):
        low, high = key_range(mask, start, start + 1, 4)
        assert not expected[start, :low].any() and not expected[start, high:].any()


def test_a_causal_query_sees_itself():
    assert all_see_themselves(Mask(causal=True, window=1, prefix_length=2), 4, 4)
    assert all_see_themselves(Mask(causal=True, q_offset=2), 2, 4)
    assert not all_see_themselves(Mask(causal=True), 5, 4)


def test_rows_of_a_batch_have_lengths_of_their_own():
    mask = Mask(causal=True, q_offset=np.array([0, 2]), kv_length=np.array([4, 1]), prefix_length=np.array([2, 0]))
    first, second = np.asarray(visible(mask, 0, 2, 0, 4))
    np.testing.assert_array_equal(first, [[1, 1, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(second, [[1, 0, 0, 0], [1, 0, 0, 0]])


def test_nothing_hidden_needs_no_array():
    assert visible(Mask(), 0, 4, 0, 4) is None


def test_a_causal_mask_skips_what_lies_ahead():
    assert key_range(Mask(causal=True), 16, 32, 64) == (0, 32)
    assert key_range(Mask(causal=True, window=8), 16, 32, 64) == (9, 32)
    assert key_range(Mask(causal=True, q_offset=20), 16, 32, 64) == (0, 52)
    assert key_range(Mask(causal=True, window=8, prefix_length=4), 16, 32, 64) == (0, 32)
    assert key_range(Mask(causal=True, kv_length=7), 16, 32, 64) == (0, 7)
    assert key_range(Mask(causal=True, block_ids=np.ones((1, 64), int)), 16, 32, 64) == (0, 64)
    assert key_range(Mask(causal=True, q_offset=jnp.array(3)), 16, 32, 64) == (0, 64)


def test_ints_stay_static_and_arrays_are_leaves():
    mask = Mask(causal=True, window=4, prefix_length=2, q_offset=jnp.array([1]), kv_length=jnp.array(3))
    assert len(jax.tree.leaves(mask)) == 2
    seen = []
    jax.jit(lambda m: seen.append(m) or m.kv_length)(mask)
    assert (seen[0].causal, seen[0].window, seen[0].prefix_length) == (True, 4, 2)
    doubled = jax.tree.map(lambda x: 2 * x, mask)
    assert doubled.kv_length == 6 and doubled.q_offset.tolist() == [2] and doubled.prefix_length == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 3}, "needs causal=True"),
        ({"causal": True, "window": 0}, "at least 1"),
        ({"kv_segment_ids": np.ones((2, 4), int)}, "without q_segment_ids"),
        ({"q_segment_ids": np.ones((2, 4), int)}, "need kv_segment_ids too"),
        ({"q_segment_ids": np.ones(4, int), "kv_segment_ids": np.ones((2, 6), int)}, r"q_segment_ids .* \(2, 4\)"),
        ({"kv_length": np.ones((2, 1), int)}, r"kv_length must have shape \(\) or \(2,\), found \(2, 1\)"),
        ({"kv_length": np.array([3, 2**40])}, "kv_length must hold numbers that fit int32, found 3 to 1099511627776"),
        ({"q_offset": -(2**31) - 1}, "q_offset must hold numbers that fit int32"),
        ({"causal": True, "q_offset": 2**31 - 1}, "q_offset must lie within .*, found 2147483647 to 2147483647"),
        ({"causal": True, "q_offset": np.array([3, -(2**31)], np.int32)}, "within .*, found -2147483648 to 3"),
        ({"q_segment_ids": np.full((2, 4), 2**32), "kv_segment_ids": np.ones((2, 6), int)}, "q_segment_ids .* int32"),
        ({"causal": True, "block_ids": np.ones((2, 4), int)}, "block_ids needs as many keys as queries"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    q, k = np.zeros((2, 4, 2, 8), np.float32), np.zeros((2, 6, 2, 8), np.float32)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, Mask(**fields))


def test_numpys_numbers_say_the_same():
    mask = Mask(causal=np.True_, window=np.int64(3), prefix_length=np.int32(2), q_offset=np.array([1, 2], np.int8))
    assert len(jax.tree.leaves(mask)) == 2 and mask.causal is True and type(mask.window) is int
    q = np.random.default_rng(0).standard_normal((2, 6, 1, 4)).astype(np.float32)
    expected = attention(q, q, q, Mask(causal=True, window=3, prefix_length=2, q_offset=np.array([1, 2])))
    np.testing.assert_array_equal(jax.jit(attention)(q, q, q, mask), expected)


@pytest.mark.parametrize("window", [2**30, 2**31 - 1, 2**40])
def test_a_window_longer_than_any_text_is_none(window):
    assert Mask(causal=True, window=window).window is None
    with pytest.raises(ValueError, match="needs causal=True"):
        Mask(window=window)
    q = np.random.default_rng(0).standard_normal((1, 4, 1, 4)).astype(np.float32)
    all_of_it = Mask(causal=True, prefix_length=window, kv_length=window)
    np.testing.assert_array_equal(attention(q, q, q, all_of_it), attention(q, q, q, Mask(causal=True, prefix_length=4)))


@pytest.mark.parametrize("q_offset", [2**30, -(2**30)])
def test_the_largest_offsets(q_offset):
    q = np.random.default_rng(0).standard_normal((1, 4, 1, 4)).astype(np.float32)
    found = attention(q, q, q, Mask(causal=True, q_offset=q_offset))
    np.testing.assert_array_equal(found, attention(q, q, q) if q_offset > 0 else np.zeros_like(q))


@pytest.mark.parametrize("kernel", [attention, decode_attention])
def test_every_backend_counts_in_int32(monkeypatch, kernel):
    seen = []

    def spy(q, k, v, mask, *rest):
        seen.append(mask)
        return (q, q) if kernel is attention else q

    monkeypatch.setitem(sys.modules[kernel.__module__].BACKENDS, "spy", Backend((), spy))
    q = np.zeros((2, 4, 4, 8), np.float32)
    mask = Mask(
        kv_length=np.array([3, 1], np.int8), q_segment_ids=np.ones((2, 4), np.uint8), q_offset=jnp.array(1, "uint32")
    )
    kernel(q, q, q, mask, backend="spy")
    assert [leaf.dtype for leaf in jax.tree.leaves(seen)] == [np.int32] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attention(*[np.zeros((1, 2, 1, 4), np.float32)] * 3, Mask(kv_length=[3])), "int or an array, found"),
        (lambda: Mask(causal="yes"), "Mask.causal must be True or False, found 'yes'"),
        (lambda: Mask(causal=True, window=4.0), "Mask.window must be an int that is known when tracing, found 4.0"),
        (lambda: jax.jit(lambda n: Mask(causal=True, window=n).window)(3), "known when tracing, found .*int32"),
        (
            lambda: attention(*[np.zeros((1, 2, 1, 4), np.float32)] * 3, np.ones((1, 2, 2), bool)),
            "found ndarray: T x S",
        ),
    ],
)
def test_what_is_no_mask_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_lengths_are_integers():
    q = np.zeros((2, 4, 2, 8), np.float32)
    with pytest.raises(TypeError, match="Mask.kv_length must hold integers, found float32"):
        attention(q, q, q, Mask(kv_length=np.float32(3)))
