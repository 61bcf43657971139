"""The static estimate on a kernel whose counts are known by hand, compiled for real, and the cases' own arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_static.decode import OurDecode
from benchmarks.tpu_static.experts import PRODUCTS, OurExperts, grouped_settings
from benchmarks.tpu_static.measure import measure
from benchmarks.tpu_static.shapes import Attention, Decode, Experts
from kernels.static_estimate import CompileError, Geometry, chip_process, compile_program, estimate
from kernels.static_estimate.estimate import grid_step

SIZE, BLOCK_M, BLOCK_K, BLOCK_N = 1024, 256, 256, 512


def blocked_matmul(a, b):
    def body(a, b, out, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out[...] = total[...].astype(out.dtype)

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16),
        grid=(SIZE // BLOCK_M, SIZE // BLOCK_N, SIZE // BLOCK_K),
        in_specs=[
            pl.BlockSpec((BLOCK_M, BLOCK_K), lambda i, j, k: (i, k)),
            pl.BlockSpec((BLOCK_K, BLOCK_N), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((BLOCK_M, BLOCK_N), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((BLOCK_M, BLOCK_N), jnp.float32)],
        name="blocked_matmul",
    )(a, b)


def too_large(a):
    spec = pl.BlockSpec((SIZE * 64, SIZE), lambda i: (i, 0))
    copy = pl.pallas_call(
        lambda a, out: pltpu.sync_copy(a, out), out_shape=a, grid=(2,), in_specs=[spec], out_specs=spec
    )
    return copy(a)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "side"), [("v5e", 128), ("v6e", 256)])
def test_a_compiled_product_has_the_counts_known_by_hand(chip, side):
    pytest.importorskip("libtpu")
    matrix = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
    with chip_process(chip) as process:
        program = process.submit(compile_program, blocked_matmul, (matrix, matrix)).result()
        with pytest.raises(CompileError, match="(?i)vmem"):
            process.submit(
                compile_program, too_large, (jax.ShapeDtypeStruct((SIZE * 128, SIZE), jnp.float32),)
            ).result()
    (kernel,) = program.kernels
    assert (kernel.name, kernel.grid) == ("blocked_matmul", (4, 2, 4))
    step = grid_step(kernel.bundles)
    # A vmatmul takes 16 rows of bf16 through one array of side x side.
    assert step.always.all_matmuls == {"bf16": BLOCK_M // 16 * (BLOCK_K // side) * (BLOCK_N // side)}
    assert (len(step.bodies), len(step.rows)) == (0, 2)
    assert program.argument_bytes == 2 * program.output_bytes == 4 * SIZE**2
    found = estimate(kernel, Geometry(rows=(8,)), chip)
    peak = {"v5e": 197e12, "v6e": 918e12}[chip]
    assert found.floor_milliseconds == pytest.approx(1e3 * 2 * SIZE**3 / peak, rel=0.02)
    assert found.floor_milliseconds < found.milliseconds < 10 * found.floor_milliseconds


SMALL = Experts(E=4, rows_per_expert=128, D=256, F=128, spread=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_small_experts_are_measured(product):
    """The program, its kernel and its geometry belong together: also where a gradient leaves the forward out."""
    pytest.importorskip("libtpu")
    jax_s_own = [one for one in grouped_settings(SMALL, product) if one.package != "tokamax"]
    with chip_process("v5e") as process:
        for candidate in (OurExperts(SMALL, product), *jax_s_own):
            found = process.submit(measure, candidate, "v5e", 300).result()
            least = 1e3 * 2 * SMALL.M * SMALL.D * SMALL.F / 197e12
            assert least < found.floor_milliseconds <= found.cycle_milliseconds < 100 * least, candidate.name
            assert len(found.by_kernel) == 1 and found.memory_milliseconds > 0


@pytest.mark.slow
def test_decoding_is_measured_and_bound_by_its_cache():
    pytest.importorskip("libtpu")
    shape = Decode(B=2, N=4, K=2, length=4096, H=128)
    with chip_process("tpu7x") as process:
        found = process.submit(measure, OurDecode(shape), "tpu7x", 300).result()
    assert found.memory_milliseconds == pytest.approx(1e3 * 2 * 2 * 2 * 4096 * 128 * 2 / 3.69e12)
    assert 0 < found.floor_milliseconds < found.cycle_milliseconds


def brute_force(shape: Attention) -> np.ndarray:
    query, key = np.arange(shape.T)[:, None], np.arange(shape.T)[None]
    seen = np.ones((shape.T, shape.T), bool)
    if shape.causal:
        seen &= key <= query
    if shape.window is not None:
        seen &= query - key < shape.window
    if shape.documents:
        seen &= shape.segment_ids[:, None] == shape.segment_ids[None]
    return seen


@pytest.mark.parametrize(
    "shape",
    [
        Attention(1, 1, 1, 96, 8),
        Attention(1, 1, 1, 90, 8, causal=False),
        Attention(1, 1, 1, 96, 8, window=20),
        Attention(1, 1, 1, 96, 8, documents=(16, 30, 2, 48)),
        Attention(1, 1, 1, 96, 8, causal=False, documents=(33, 63)),
    ],
)
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 48)])
def test_blocks_are_counted_as_the_mask_says(shape, blocks):
    seen, (block_q, block_kv) = brute_force(shape), blocks
    tiles = [
        seen[i : i + block_q, j : j + block_kv] for i in range(0, shape.T, block_q) for j in range(0, shape.T, block_kv)
    ]
    full = sum(tile.all() for tile in tiles)
    assert shape.blocks(*blocks) == (full, sum(tile.any() for tile in tiles) - full)


def test_causal_rows_of_blocks():
    geometry = Attention(B=2, N=3, K=1, T=64, H=8).geometry(16, 32)
    assert geometry == Geometry(bodies=(6 * 2, 6 * 4), rows=(6 * 4,))
    assert Attention(B=2, N=3, K=1, T=64, H=8).geometry(16, 32, rows_of="keys").rows == (6 * 2,)


def test_a_tile_is_visited_once_for_each_expert_with_rows_in_it():
    shape = Experts(E=7, rows_per_expert=40, D=8, F=8, spread=1.5)
    expert = np.repeat(np.arange(7), shape.group_sizes())
    assert len(expert) == shape.M and len(set(shape.group_sizes())) > 3
    assert shape.visits(16) == sum(len(set(expert[i : i + 16])) for i in range(0, shape.M, 16))
    assert Experts(E=4, rows_per_expert=32, D=8, F=8, spread=0).visits(16) == 8


def test_bytes_of_a_grouped_product():
    shape = Experts(E=4, rows_per_expert=32, D=8, F=6, spread=0)
    assert shape.geometry(16, 8, 6).hbm_bytes == 2 * (128 * 8 + 4 * 8 * 6 + 128 * 6)
    assert shape.geometry(16, 8, 3).hbm_bytes == 2 * (2 * 128 * 8 + 4 * 8 * 6 + 128 * 6)
    assert shape.geometry(16, 4, 6).steps == 16


def test_the_gradients_of_a_grouped_product():
    shape = Experts(E=4, rows_per_expert=32, D=8, F=6, spread=0)
    assert (shape.turned.D, shape.turned.F, shape.turned.M) == (6, 8, 128)
    whole = shape.outer_geometry(16, 8, 6)
    assert whole == Geometry(bodies=(8,), rows=(4,), steps=8, hbm_bytes=2 * (128 * 8 + 128 * 6 + 4 * 8 * 6))
    halves = shape.outer_geometry(16, 4, 6)
    assert (halves.bodies, halves.rows) == ((16,), (8,))
    assert halves.hbm_bytes - whole.hbm_bytes == 2 * 128 * 6


def test_bytes_of_a_cache():
    assert Decode(B=2, N=4, K=2, length=16, H=8).hbm_bytes == 2 * (2 * 2 * 16 * 8) * 2
    assert Decode(B=2, N=4, K=2, length=16, H=8, cache="int8").hbm_bytes == 2 * (2 * 2 * 16) * (8 + 4)
