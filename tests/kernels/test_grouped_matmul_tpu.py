"""The TPU kernels' bodies, interpreted: every split of the rows over tiles and groups, and what must not leak."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_in_float64 import exact, exact_gated
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul.quantized import QuantizedMatrices
from kernels.grouped_matmul.tpu import backend, tiles, visits

CHIP = tiles.Chip(matrix_unit=128, memory=64 << 20, cores=1)
SMALL = tiles.Chip(matrix_unit=32, memory=80_000, cores=1)  # tiles of 256 rows, products of 32


def float64(x):
    return np.asarray(x, np.float64)


@partial(jax.jit, static_argnames=("turned", "chip"))
def run(x, w, sizes, dy, turned, chip):
    """y, dx, dw: one program for all splits of the same rows."""
    y, back = jax.vjp(lambda x, w: backend.grouped_matmul(x, (w,), sizes, turned, None, chip, True), x, w)
    return y, *back(dy)


def test_of_sizes_beyond_the_rows_the_excess_counts_for_nothing():
    draw = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((300, 8), (3, 8, 4), (300, 4)))
    found = run(x, w, jnp.array([200, 150, 9]), dy, False, CHIP)
    for got, true in zip(found, exact(x, w, [200, 100, 0], dy), strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-4)


def check(sizes, rows, inner, width, turned=False, dtype=jnp.float32, limit=1e-5, chip=CHIP):
    """Against float64; what stands behind the last group is NaN."""
    draw, live = np.random.default_rng(0), sum(sizes)
    shapes = (rows, inner), (len(sizes), inner, width), (rows, width)
    x, w, dy = (jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes)
    true = exact(x, w, sizes, dy)
    behind = (jnp.arange(rows) >= live)[:, None]
    x, dy = (jnp.where(behind, jnp.nan, a) for a in (x, dy))
    y, dx, dw = run(x, w.swapaxes(1, 2) if turned else w, jnp.asarray(sizes, jnp.int32), dy, turned, chip)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    dw = dw.swapaxes(1, 2) if turned else dw
    for name, got, want in zip(("y", "dx", "dw"), (y, dx, dw), true, strict=True):
        assert np.abs(float64(got) - want).max(initial=0) <= limit * max(np.abs(want).max(initial=0), 1e-3), name
    assert not np.any(y[live:]) and not np.any(dx[live:]), "behind the last group"
    assert not np.any(float64(dw)[np.asarray(sizes) == 0]), "a group without rows"


def splits(rows, groups):
    """Sizes of groups that hold `rows` rows at most."""
    cuts = st.lists(st.integers(0, rows), min_size=groups, max_size=groups)
    return cuts.map(lambda ends: np.diff([0, *sorted(ends)]).tolist())


@settings(max_examples=40, deadline=None)
@given(sizes=splits(600, 4), turned=st.booleans())
def test_every_split(sizes, turned):
    assert tiles.for_products(600, 9, 7, 4, 4, 4, SMALL)[:2] == (256, 32)
    check(sizes, 600, 9, 7, turned, chip=SMALL)


@pytest.mark.parametrize(
    "sizes", [[0, 0, 2100], [2100, 0, 0], [1024, 0, 1024], [1000, 600, 31], [15, 1, 1030]], ids=str
)
def test_groups_over_several_tiles(sizes):
    check(sizes, 2110, 6, 5)


def test_no_rows_at_all():
    check([0, 0, 0], 2110, 6, 5)


@pytest.mark.parametrize("rows", [1, 5, 16, 33])
def test_few_rows(rows):
    check([rows], rows, 3, 2)


def test_a_matrix_in_parts():
    """Too wide for the memory: columns of y and both sides of the matrices' gradient come in parts."""
    small = tiles.Chip(matrix_unit=128, memory=1_200_000, cores=1)
    assert tiles.for_products(60, 300, 290, 3, 4, 4, small).columns == 128
    outer = tiles.for_outer(60, 300, 290, 3, 4, 4, small)
    assert outer.inner == 128 and outer.columns == 256
    check([20, 0, 33], 60, 300, 290, chip=small)


def test_bfloat16_is_summed_in_float32():
    check([300, 0, 41], 344, 512, 8, dtype=jnp.bfloat16, limit=6e-3)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantized_matrices(dtype, turned):
    """As the same matrices widened before: forward and the gradient to the rows; none to the matrices."""
    draw, sizes = np.random.default_rng(0), jnp.array([20, 0, 33])
    x, dy = (jnp.asarray(draw.normal(size=(60, n)), jnp.float32) for n in (9, 290))
    values = jnp.asarray(draw.integers(-99, 99, (3, 290, 9) if turned else (3, 9, 290))).astype(dtype)
    w = QuantizedMatrices(values, jnp.asarray(draw.uniform(0.1, 1, (3, 290)), jnp.float32))
    small = tiles.Chip(matrix_unit=128, memory=340_000, cores=1)
    assert tiles.for_products(60, 9, 290, 3, 4, 1, small).columns == 128, "scales come in parts too"
    y, back = jax.vjp(lambda x: backend.grouped_matmul(x, (w,), sizes, turned, None, small, True), x)
    wide = np.swapaxes(w.values, 1, 2) if turned else w.values
    true = exact(x, float64(wide) * float64(w.scales)[:, None], sizes, dy)
    for got, want in zip((y, *back(dy)), true[:2], strict=True):
        assert np.abs(float64(got) - want).max() <= 1e-5 * np.abs(want).max()


@partial(jax.jit, static_argnames=("turned", "chip"))
def run_gated(x, gate, up, sizes, dy, turned, chip):
    def forward(x, gate, up):
        gate, up = (w.swapaxes(1, 2) if turned else w for w in (gate, up))
        return backend.grouped_matmul(x, (gate, up), sizes, turned, jax.nn.silu, chip, True)

    y, back = jax.vjp(forward, x, gate, up)
    return y, forward(x, gate, up), *back(dy)


def check_gated(sizes, rows, inner, width, turned=False, dtype=jnp.float32, limit=1e-5, chip=CHIP):
    """Against float64; what stands behind the last group is NaN."""
    draw, live = np.random.default_rng(0), sum(sizes)
    shapes = (rows, inner), (len(sizes), inner, width), (len(sizes), inner, width), (rows, width)
    x, gate, up, dy = (jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes)
    true = exact_gated(x, gate, up, sizes, dy)
    x, dy = (a.at[live:].set(jnp.nan) for a in (x, dy))
    y, alone, *gradients = run_gated(x, gate, up, jnp.asarray(sizes, jnp.int32), dy, turned, chip)
    np.testing.assert_array_equal(y, alone, err_msg="without a gradient there is another kernel")
    assert {a.dtype for a in (y, *gradients)} == {jnp.dtype(dtype)}
    for name, got, want in zip(("y", "dx", "dgate", "dup"), (y, *gradients), true, strict=True):
        assert np.abs(float64(got) - want).max(initial=0) <= limit * max(np.abs(want).max(initial=0), 1e-3), name
    assert not np.any(y[live:]) and not np.any(gradients[0][live:]), "behind the last group"
    for gradient in gradients[1:]:
        assert not np.any(float64(gradient)[np.asarray(sizes) == 0]), "a group without rows"


@settings(max_examples=15, deadline=None)
@given(sizes=splits(600, 4))
def test_gated(sizes):
    small = SMALL._replace(memory=120_000)
    assert tiles.for_products(600, 9, 7, 4, 4, 4, small, matrices=2, outputs=3)[:2] == (256, 32)
    check_gated(sizes, 600, 9, 7, chip=small)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sizes", [[0, 0, 1100], [1000, 0, 31], [0, 0, 0]], ids=str)
def test_gated_over_several_tiles(sizes, turned):
    check_gated(sizes, 1110, 6, 5, turned)


@pytest.mark.parametrize("turned", [False, True])
def test_gated_in_parts(turned):
    """Too wide for the memory: as for one matrix."""
    small = tiles.Chip(matrix_unit=128, memory=1_800_000, cores=1)
    of_rows, of_matrices = dict(matrices=2, outputs=3), dict(rights=2)
    assert tiles.for_products(60, 300, 290, 3, 4, 4, small, **of_rows).columns == 128
    assert tiles.for_outer(60, 300, 290, 3, 4, 4, small, **of_matrices).inner == 128
    check_gated([20, 0, 33], 60, 300, 290, turned, chip=small)


def test_gated_in_bfloat16():
    check_gated([300, 0, 41], 344, 128, 8, dtype=jnp.bfloat16, limit=2e-2)


def test_gated_by_quantized_matrices():
    draw, sizes = np.random.default_rng(0), jnp.array([20, 0, 33])
    x, dy = (jnp.asarray(draw.normal(size=(60, n)), jnp.float32) for n in (9, 290))
    values = jnp.asarray(draw.integers(-99, 99, (2, 3, 9, 290)), jnp.int8)
    scales = jnp.asarray(draw.uniform(0.001, 0.01, (2, 3, 290)), jnp.float32)
    gate, up = map(QuantizedMatrices, values, scales)
    y, back = jax.vjp(lambda x: backend.grouped_matmul(x, (gate, up), sizes, False, jax.nn.silu, CHIP, True), x)
    wide = (float64(w.values) * float64(w.scales)[:, None] for w in (gate, up))
    for got, want in zip((y, *back(dy)), exact_gated(x, *wide, [20, 0, 33], dy)[:2], strict=True):
        assert np.abs(float64(got) - want).max() <= 1e-5 * np.abs(want).max()


def test_matrices_of_another_type_than_the_rows():
    draw, sizes = np.random.default_rng(0), jnp.array([20, 0, 33])
    x, w = jnp.asarray(draw.normal(size=(60, 9)), jnp.bfloat16), jnp.asarray(draw.normal(size=(3, 9, 5)), jnp.float32)
    y, dx, dw = run(x, w, sizes, jnp.ones((60, 5), jnp.bfloat16), False, CHIP)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for got, want in zip((y, dx, dw), exact(x, w, sizes, np.ones((60, 5))), strict=True):
        assert np.abs(float64(got) - want).max() <= 1e-2 * np.abs(want).max()


@settings(max_examples=60, deadline=None)
@given(sizes=splits(100, 6), tile=st.sampled_from([16, 32]))
def test_every_tile_meets_every_group_in_it_once(sizes, tile):
    rows = 100
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pairs = sorted({(int(group), row // tile) for row, group in enumerate(owner)})
    found = jax.jit(visits.of_tiles, static_argnums=(1, 2))(jnp.asarray(sizes), rows, tile)
    ours = list(zip(found.group[: found.count].tolist(), found.tile[: found.count].tolist(), strict=True))
    assert ours[: len(pairs)] == pairs
    reached = -(-sum(sizes) // tile)
    assert [t for _, t in ours[len(pairs) :]] == list(range(reached, -(-rows // tile))), "the rest is written too"
    found = jax.jit(visits.of_groups, static_argnums=(1, 2))(jnp.asarray(sizes), rows, tile)
    ours = list(zip(found.group[: found.count].tolist(), found.tile[: found.count].tolist(), strict=True))
    assert [pair for pair in ours if sizes[pair[0]]] == pairs
    assert [group for group, _ in ours if not sizes[group]] == [g for g, size in enumerate(sizes) if not size]


@pytest.mark.parametrize("average", [1, 16, 64, 256, 512, 4096])
def test_half_a_product_is_at_most_a_quarter_of_the_average_group(average):
    chip = tiles.Chip(matrix_unit=256, memory=128 << 20, cores=1)
    found = tiles.for_products(128 * average, 2048, 768, 128, 2, 2, chip)
    assert found.columns == 768, "all of a matrix where it fits"
    assert found.product // 2 <= max(average // 4, tiles.ALIGNMENT)
    assert found.rows % found.product == 0


def test_what_it_refuses(monkeypatch):
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.array([2, 2])
    small = QuantizedMatrices(w.astype(jnp.int8), jnp.ones(()))
    monkeypatch.setattr(tiles, "this_chip", lambda: CHIP)
    assert backend.refusal(x, (w,), sizes, False, None) is None
    assert backend.refusal(x, (small,), sizes, False, None) is None
    assert "found float16" in backend.refusal(x.astype(jnp.float16), (w,), sizes, False, None)
    assert "or quantized, found int8" in backend.refusal(x, (w.astype(jnp.int8),), sizes, False, None)
    assert "found x (0, 3)" in backend.refusal(x[:0], (w,), sizes, False, None)
    wide = jax.ShapeDtypeStruct((2, 10**6, 5), jnp.float32)
    assert "more memory" in backend.refusal(jax.ShapeDtypeStruct((4, 10**6), jnp.float32), (wide,), sizes, False, None)
