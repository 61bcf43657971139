"""What the estimate says that grouped products do, against what the kernels do when they run (in interpret mode)."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kernels.grouped_matmul.tpu import backend, outer, tiles
from kernels.static_estimate import Kernel
from kernels.static_estimate.bundles import Part
from kernels.static_estimate.grouped_matmul import grouped_matmul_geometry

CHIP = tiles.Chip(matrix_unit=128, memory=1 << 20, cores=1)
SIZES = np.array([70, 0, 200, 1, 113, 128, 272])  # of 1024 rows: in tiles of 256, 64 and 32 of them at a time
X, W = jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16), jax.ShapeDtypeStruct((7, 256, 128), jnp.bfloat16)


@pytest.fixture(autouse=True)
def small_chip(monkeypatch):
    monkeypatch.setattr(tiles, "this_chip", lambda: CHIP)


@pytest.fixture
def runs(monkeypatch):
    """Counts the products that kernels run, by their rows, and the blocks out of which rows are cut."""
    counted, plain, where = Counter(), lax.dot_general, jnp.where

    def counting(a, b, dimensions, **options):
        rows = a.shape[dimensions[0][0][0]] if dimensions[0][0] == (0,) else len(a)
        jax.debug.callback(lambda: counted.update([rows]))
        return plain(a, b, dimensions, **options)

    def cutting(condition, rows, other):
        if rows.ndim == 2:
            jax.debug.callback(lambda: counted.update(["cut"]))
        return where(condition, rows, other)

    monkeypatch.setattr(lax, "dot_general", counting)
    monkeypatch.setattr(outer.jnp, "where", cutting)
    return counted


def compiled(name, *blocks, bodies):
    """A kernel with so many conditional parts that multiply."""
    parts = [Part("branch", 2 * n, 2 * n + 1, matmuls=Counter(bf16=1)) for n in range(bodies)]
    work = Part("branch", 0, 80, parts=parts, matmuls=Counter() if bodies else Counter(bf16=1))
    return Kernel(name, (1, None), Part("kernel", 0, 99, parts=[Part("loop", 0, 90, parts=[work])]), blocks)


def rows(shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@pytest.mark.parametrize("gradient", [False, True])
def test_products_are_as_many_as_the_kernel_runs(runs, gradient):
    plan = backend._tiles(X, W, 1, False, CHIP)[gradient]
    assert (plan.rows, plan.product) == (256, 64)
    x = rows((1024, plan.inner))
    backend.grouped_matmul(x, (rows(W.shape),), jnp.asarray(SIZES), gradient, None, CHIP, True).block_until_ready()
    jax.effects_barrier()

    block = (1, plan.columns, plan.inner) if gradient else (1, plan.inner, plan.columns)
    blocks = (plan.rows, plan.inner), block
    one = grouped_matmul_geometry(compiled("grouped_matmul", *blocks, bodies=1), X, W, SIZES, gradient)
    two = grouped_matmul_geometry(compiled("grouped_matmul", *blocks, bodies=2), X, W, SIZES, gradient)
    parts = plan.columns // plan.part
    assert one.bodies == (runs[32] // parts,) and one.rows == (4,)
    assert one.steps * one.trips[0] * parts == pytest.approx(runs[64])
    assert two.bodies[0] * two.trips[0] * parts == pytest.approx(runs[64])
    assert two.bodies[1:] == one.bodies and two.bodies[0] < two.steps == one.steps


def test_sums_over_rows_are_as_many_as_the_kernel_runs(runs):
    plan = backend._tiles(X, W, 1, False, CHIP)[2]
    arrays = (rows((1024, 256)),), (rows((1024, 128)),), jnp.asarray(SIZES)
    jax.block_until_ready(outer.outer(*arrays, jnp.bfloat16, plan, 1 << 20, True))
    jax.effects_barrier()

    blocks = (plan.rows, plan.inner), (plan.rows, plan.columns)
    found = grouped_matmul_geometry(compiled("grouped_matmul_outer", *blocks, bodies=1), X, W, SIZES, False)
    parts = 256 // plan.inner * (128 // plan.columns)
    assert found.rows == (7 * parts,)
    assert found.bodies[0] * found.trips[0] == pytest.approx(runs[plan.product])
    assert found.shares[1] * runs[plan.product] == pytest.approx(runs["cut"] / 2)
    assert sum(found.shares) == 1
    without = grouped_matmul_geometry(compiled("grouped_matmul_outer", *blocks, bodies=0), X, W, SIZES, False)
    assert without.bodies == () and without.steps * without.trips[0] == pytest.approx(runs[plan.product])


def test_every_byte_is_read_once_where_blocks_take_all_columns():
    plan = backend._tiles(X, W, 1, False, CHIP)[0]
    blocks = (plan.rows, plan.inner), (1, plan.inner, plan.columns)
    found = grouped_matmul_geometry(compiled("grouped_matmul", *blocks, bodies=1), X, W, SIZES, False)
    assert plan.columns == 128
    assert found.hbm_bytes == 2 * (1024 * 256 + 7 * 256 * 128 + 1024 * 128)


def test_blocks_that_the_plan_does_not_know_are_an_error():
    with pytest.raises(ValueError, match="its plan says"):
        kernel = compiled("grouped_matmul", (128, 256), (1, 256, 128), bodies=1)
        grouped_matmul_geometry(kernel, X, W, SIZES, False)
