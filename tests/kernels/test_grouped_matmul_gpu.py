"""The Hopper kernels of grouped products, interpreted: numbers against float64, and races. There is no GPU here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_in_float64 import exact, exact_gated
from hopper import compiling_for
from hopper_interpreter import interpreter, races_found
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import grouped_matmul
from kernels.grouped_matmul.gpu import backend, windows
from kernels.grouped_matmul.quantized import QuantizedMatrices

LIMIT = {jnp.bfloat16: 6e-3, jnp.float16: 1e-3}  # one rounding, of the largest number


@pytest.fixture
def interpret(monkeypatch):
    return interpreter(monkeypatch)


def float64(x):
    return np.asarray(x, np.float64)


def draws(sizes, rows, inner, width, dtype, matrices=1):
    draw = np.random.default_rng(0)
    shapes = (rows, inner), *[(len(sizes), inner, width)] * matrices, (rows, width)
    return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def check(interpret, sizes, rows, inner, width, turned=False, dtype=jnp.bfloat16, blocks=2):
    """y, dx and dw; what stands behind the last group is NaN."""
    x, w, dy = draws(sizes, rows, inner, width, dtype)
    live, true = sum(sizes), exact(x, w, sizes, dy)
    x, dy = (a.at[live:].set(jnp.nan) for a in (x, dy))

    def run(x, w):
        return backend.grouped_matmul(x, (w,), jnp.asarray(sizes, jnp.int32), turned, None, blocks, interpret)

    y, back = jax.vjp(run, x, w.swapaxes(1, 2) if turned else w)
    dx, dw = back(dy)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    dw = dw.swapaxes(1, 2) if turned else dw
    for name, got, want in zip(("y", "dx", "dw"), (y, dx, dw), true, strict=True):
        assert got.shape == want.shape
        assert np.abs(float64(got) - want).max() <= LIMIT[dtype] * max(np.abs(want).max(), 1e-3), name
    assert not np.any(y[live:]) and not np.any(dx[live:]), "behind the last group"
    assert not np.any(float64(dw)[np.asarray(sizes) == 0]), "a group without rows"
    assert not races_found()


@pytest.mark.parametrize("sizes", [[100, 0, 77], [3, 189, 8], [0, 0, 200], [0, 0, 0]], ids=str)
def test_groups_of_any_size_and_rows_behind_them(interpret, sizes):
    """Five steps of a sum, so that the four slots of the ring come again."""
    check(interpret, sizes, 200, 320, 64)


def test_matrices_transposed_and_rows_that_make_no_whole_tile(interpret):
    check(interpret, [0, 13], 13, 64, 192, turned=True, blocks=1)


def test_gated(interpret):
    sizes, rows = [5, 0, 20], 30
    x, gate, up, dy = draws(sizes, rows, 64, 64, jnp.bfloat16, matrices=2)
    true = exact_gated(x, gate, up, sizes, dy)
    x, dy = (a.at[25:].set(jnp.nan) for a in (x, dy))

    def run(x, gate, up):
        sizes_ = jnp.asarray(sizes, jnp.int32)
        return backend.grouped_matmul(x, (gate, up), sizes_, False, jax.nn.silu, 1, interpret)

    y, back = jax.vjp(run, x, gate, up)
    for name, got, want in zip(("y", "dx", "dgate", "dup"), (y, *back(dy)), true, strict=True):
        assert np.abs(float64(got) - want).max() <= 2e-2 * np.abs(want).max(), name
    assert not races_found()


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("sizes", "rows", "inner", "width"),
    [
        ([0, 0, 0], 40, 64, 64),
        ([1], 1, 64, 64),
        ([3, 200, 1, 0, 8, 127, 129], 470, 64, 320),
        ([128, 64, 0, 256], 448, 128, 576),
        ([7, 121], 128, 704, 128),
    ],
    ids=str,
)
def test_more_sizes(interpret, sizes, rows, inner, width, turned):
    check(interpret, sizes, rows, inner, width, turned, blocks=3)


@pytest.mark.slow
def test_float16(interpret):
    check(interpret, [100, 0, 77], 200, 128, 64, dtype=jnp.float16)


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.integers(0, 75), min_size=6, max_size=6), rows=st.sampled_from([600, 8, 128]))
def test_every_row_is_in_one_window_of_its_group(cuts, rows):
    sizes = np.diff([0, *sorted(min(8 * cut // 3, rows) for cut in cuts)])
    owner = np.append(np.repeat(np.arange(6), sizes), np.full(rows - sum(sizes), 6))
    found = jax.jit(windows.of_groups, static_argnums=1)(jnp.asarray(sizes, jnp.int32), rows)
    (count,), *columns = map(np.asarray, found)
    assert count <= len(found.group), "there is room for all"
    seen = []
    for group, top, first, end in zip(*(column[:count] for column in columns), strict=True):
        assert top % windows.ALIGNMENT == 0 and top <= first < end <= top + windows.ROWS
        assert set(owner[first:end]) == {group}
        seen += range(first, end)
    assert seen == list(range(rows))


def abstract(rows=16, inner=64, width=128, dtype=jnp.bfloat16, w_dtype=None, groups=3):
    x = jax.ShapeDtypeStruct((rows, inner), dtype)
    w = jax.ShapeDtypeStruct((groups, inner, width), w_dtype or dtype)
    return x, w, jax.ShapeDtypeStruct((groups,), jnp.int32)


@pytest.mark.parametrize(
    ("device", "ours"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100-SXM4-80GB", False), ("NVIDIA B200", False)]
)
def test_auto_takes_it_for_hopper_and_no_other_where_it_may(monkeypatch, device, ours):
    with compiling_for(device):
        assert "wgmma" not in str(jax.make_jaxpr(grouped_matmul)(*abstract()))
        monkeypatch.setenv("KERNELS_UNTRIED", "1")
        program = str(jax.make_jaxpr(lambda *x: grouped_matmul(*x))(*abstract()))
    assert ("wgmma" in program) == ours


def test_auto_takes_it_for_quantized_matrices_too(monkeypatch):
    monkeypatch.setenv("KERNELS_UNTRIED", "1")
    x, w, sizes = abstract()
    w = QuantizedMatrices(jax.ShapeDtypeStruct(w.shape, jnp.int8), jax.ShapeDtypeStruct((), jnp.float32))
    with compiling_for("NVIDIA H200"):
        assert "wgmma" in str(jax.make_jaxpr(grouped_matmul)(x, w, sizes))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(dtype=jnp.float32), "rows are bfloat16 or float16, found float32"),
        (dict(w_dtype=jnp.float32), "matrices are of the rows' type, bfloat16, or quantized, found float32"),
        (dict(inner=72), r"multiples of 64, found \(72, 128\)"),
        (dict(width=72), r"multiples of 64, found \(64, 72\)"),
        (dict(rows=0), r"nothing may be empty, found x \(0, 64\)"),
    ],
    ids=str,
)
def test_what_is_refused(changed, reason):
    with compiling_for("NVIDIA H100 PCIe"), pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda *arrays: grouped_matmul(*arrays, backend="mosaic_gpu"), *abstract(**changed))


def test_refused_elsewhere_and_where_xla_splits():
    def run(*arrays):
        return grouped_matmul(*arrays, backend="mosaic_gpu")

    with pytest.raises(ValueError, match="for gpu, and this is compiled for cpu"):
        jax.eval_shape(run, *abstract())
    with compiling_for("NVIDIA H100 80GB HBM3", (2,)), pytest.raises(ValueError, match="shard_map over rows"):
        jax.eval_shape(run, *abstract())
