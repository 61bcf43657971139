"""Grouped products against NumPy in float64: every split of the rows, both layouts, and the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_in_float64 import exact, exact_gated
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import grouped_matmul
from kernels.grouped_matmul.quantized import QuantizedMatrices

BACKENDS = ("xla", "reference")


def arrays(sizes, behind, inner, width, seed=0):
    draw = np.random.default_rng(seed)
    rows = sum(sizes) + behind
    return (draw.normal(size=s) for s in ((rows, inner), (len(sizes), inner, width), (rows, width)))


def check(sizes, behind, inner, width, backend, turned=False, dtype=jnp.float32, limit=1e-5):
    x, w, dy = (jnp.asarray(a, dtype) for a in arrays(sizes, behind, inner, width))
    group_sizes = jnp.asarray(sizes, jnp.int32)
    given_w = w.swapaxes(1, 2) if turned else w
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, transpose_w=turned, backend=backend), x, given_w)
    dx, dw = back(dy)
    dw = dw.swapaxes(1, 2) if turned else dw
    assert y.dtype == dx.dtype == dw.dtype == dtype
    for name, got, true in zip(("y", "dx", "dw"), (y, dx, dw), exact(x, w, sizes, dy), strict=True):
        largest = max(np.abs(true).max(initial=0), 1e-3)
        assert np.abs(np.asarray(got, np.float64) - true).max(initial=0) <= limit * largest, name
    live = sum(sizes)
    assert not np.any(y[live:]) and not np.any(dx[live:]), "behind the last group"
    for group, size in enumerate(sizes):
        assert size or not np.any(dw[group]), "a group without rows has a gradient of exactly 0"


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    behind=st.integers(0, 9),
    inner=st.integers(1, 17),
    width=st.integers(1, 9),
    turned=st.booleans(),
)
def test_every_split(backend, sizes, behind, inner, width, turned):
    if sum(sizes) + behind:
        check(sizes, behind, inner, width, backend, turned)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[700, 0, 300], [0, 0, 1000], [1000, 0, 0], [513, 1, 511], [0, 0, 0]], ids=str)
def test_groups_larger_than_a_block_and_empty_ones(backend, sizes):
    check(sizes, 1025 - sum(sizes), 24, 12, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_summed_in_float32(backend):
    check([300, 0, 41], 3, 256, 8, backend, dtype=jnp.bfloat16, limit=8e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_leaks_from_behind_the_last_group(backend):
    sizes = jnp.array([3, 4], jnp.int32)
    x, w, dy = (jnp.asarray(a, jnp.float32) for a in arrays([3, 4], 5, 6, 4))
    run = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
    poisoned = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x.at[7:].set(jnp.nan), w)
    np.testing.assert_array_equal(run[0], poisoned[0])
    for clean, found in zip(run[1](dy), poisoned[1](dy.at[7:].set(jnp.inf)), strict=True):
        np.testing.assert_array_equal(clean, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes", [[256, 256], [100, 412], [0, 300], [300, 1], [40, 2**31 - 10], [2**31 - 1, 2**31 - 1]], ids=str
)
def test_of_sizes_beyond_the_rows_the_excess_counts_for_nothing(backend, sizes):
    x, w, dy = (jnp.asarray(a, jnp.float32) for a in arrays([256, 0], 0, 6, 4))
    fitting = np.diff(np.minimum(np.cumsum(sizes), 256), prepend=0)
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes), backend=backend), x, w)
    for got, true in zip((y, *back(dy)), exact(x, w, fitting, dy), strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", None])
def test_sizes_of_any_integers(backend, dtype):
    x, w, dy = (jnp.asarray(a, jnp.float32) for a in arrays([100, 100, 100], 0, 4, 3))
    sizes = [100, 100, 100] if dtype is None else np.full(3, 100, dtype)
    true = exact(x, w, [100, 100, 100], dy)[0]
    np.testing.assert_allclose(grouped_matmul(x, w, sizes, backend=backend), true, rtol=1e-5, atol=1e-5)


def test_no_matrices_leave_no_rows():
    x, w = jnp.ones((3, 4)), jnp.ones((0, 4, 2))
    y, (dx, dw) = jax.value_and_grad(lambda x, w: grouped_matmul(x, w, jnp.zeros(0, int)).sum(), (0, 1))(x, w)
    assert y == 0 and not dx.any() and dw.shape == w.shape


def check_gated(sizes, behind, backend, dtype, turned, limit):
    """Against float64; what stands behind the last group is NaN, in what comes from above too."""
    x, up, dy = (jnp.asarray(a, dtype) for a in arrays(sizes, behind, 9, 5))
    gate = jnp.asarray(list(arrays(sizes, behind, 9, 5, seed=1))[1], dtype)
    true, live, group_sizes = exact_gated(x, gate, up, sizes, dy), sum(sizes), jnp.asarray(sizes, jnp.int32)
    x, dy = (a.at[live:].set(jnp.nan) for a in (x, dy))

    def run(x, gate, up):
        gate, up = (w.swapaxes(1, 2) if turned else w for w in (gate, up))
        return grouped_matmul(x, up, group_sizes, gate=gate, transpose_w=turned, backend=backend)

    y, back = jax.vjp(run, x, gate, up)
    found = y, *back(dy)
    assert {a.dtype for a in found} == {jnp.dtype(dtype)}
    for name, got, want in zip(("y", "dx", "dgate", "dup"), found, true, strict=True):
        largest = max(np.abs(want).max(initial=0), 1e-3)
        assert np.abs(np.asarray(got, np.float64) - want).max(initial=0) <= limit * largest, name
    assert not np.any(y[live:]) and not np.any(found[1][live:]), "behind the last group"
    for gradient in found[2:]:
        assert not np.any(np.asarray(gradient, np.float64)[np.asarray(sizes) == 0]), "a group without rows"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sizes", [[7, 0, 31], [0, 90, 0], [0, 0, 0], [1]], ids=str)
def test_gated(backend, turned, sizes):
    check_gated(sizes, 3, backend, jnp.float32, turned, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_in_bfloat16(backend):
    check_gated([70, 0, 31], 3, backend, jnp.bfloat16, False, 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_activation(backend):
    x, up, _ = (jnp.asarray(a, jnp.float32) for a in arrays([3, 4], 2, 6, 4))
    sizes = jnp.array([3, 4])
    found = grouped_matmul(x, up, sizes, gate=-up, activation=jax.nn.relu, backend=backend)
    product = np.asarray(grouped_matmul(x, up, sizes, backend=backend))
    np.testing.assert_allclose(found, np.maximum(-product, 0) * product, rtol=1e-5, atol=1e-6)


def test_sizes_may_be_traced():
    x, w, _ = (jnp.asarray(a, jnp.float32) for a in arrays([5, 6], 0, 4, 3))
    run = jax.jit(grouped_matmul)
    first, second = run(x, w, jnp.array([5, 6])), run(x, w, jnp.array([11, 0]))
    np.testing.assert_allclose(first[:5], second[:5], rtol=1e-6)
    assert np.abs(np.asarray(first - second))[5:].max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2"])
def test_quantized_matrices(backend, one_scale, dtype):
    """As the matrices they stand for; the rows get the gradient, the matrices none."""
    draw, sizes = np.random.default_rng(0), jnp.array([3, 0, 4])
    x, dy = (jnp.asarray(draw.normal(size=(8, n)), jnp.float32) for n in (5, 6))
    values = jnp.asarray(draw.integers(-99, 99, (3, 5, 6))).astype(dtype)
    scales = jnp.asarray(0.3 if one_scale else draw.uniform(0.1, 1, (3, 6)), jnp.float32)
    plain = np.asarray(values, np.float64) * np.broadcast_to(scales, (3, 6))[:, None]
    for turned in (False, True):
        w = QuantizedMatrices(values.swapaxes(1, 2) if turned else values, scales)
        y, back = jax.vjp(lambda x: grouped_matmul(x, w, sizes, transpose_w=turned, backend=backend), x)  # noqa: B023
        for got, true in zip((y, *back(dy)), exact(x, plain, [3, 0, 4], dy)[:2], strict=True):
            np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-4)
    gradient = jax.grad(
        lambda scales: grouped_matmul(x, QuantizedMatrices(values, scales), sizes, backend=backend).sum()
    )
    assert not np.any(gradient(scales))


def test_bad_arguments_are_named():
    x, w = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5))
    sizes = jnp.array([2, 2])
    with pytest.raises(ValueError, match=r"E D F, found x \(4, 3\), w \(2, 5, 3\)"):
        grouped_matmul(x, w.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match=r"one number for each of w's matrices, found \(1,\)"):
        grouped_matmul(x, w, jnp.array([4]))
    with pytest.raises(TypeError, match="must be integers, found float32"):
        grouped_matmul(x, w, jnp.array([2.0, 2.0]))
    with pytest.raises(TypeError, match="must be one of int8, float8_e4m3fn, float8_e5m2, found float32"):
        grouped_matmul(x, QuantizedMatrices(w, jnp.ones(())), sizes)
    with pytest.raises(ValueError, match=r"a number or have shape \(2, 5\), .* found \(2, 3\)"):
        grouped_matmul(x, QuantizedMatrices(w.astype(jnp.int8), jnp.ones((2, 3))), sizes)
    with pytest.raises(TypeError, match=r"gate must be as w is, found float32 \(2, 3, 4\), w float32 \(2, 3, 5\)"):
        grouped_matmul(x, w, sizes, gate=w[:, :, :4])
    with pytest.raises(TypeError, match="found quantized int8"):
        grouped_matmul(x, w, sizes, gate=QuantizedMatrices(w.astype(jnp.int8), jnp.ones(())))
    with pytest.raises(TypeError, match="x must hold floats, found int32"):
        grouped_matmul(x.astype(int), w, sizes)
    with pytest.raises(TypeError, match="floats or QuantizedMatrices, found int8"):
        grouped_matmul(x, w.astype(jnp.int8), sizes)
    with pytest.raises(ValueError, match="no backend 'cuda'"):
        grouped_matmul(x, w, sizes, backend="cuda")
