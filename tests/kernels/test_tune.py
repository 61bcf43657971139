"""Choosing block sizes: what is tried, what is taken, and one estimate for a real chip."""

import argparse
import copy

import jax
import jax.numpy as jnp
import pytest

tuning = pytest.importorskip("kernels.attention.tpu.tuning", reason="attention has no backend for TPUs yet")

from kernels import tune  # noqa: E402
from kernels.static_estimate import chip_process  # noqa: E402

SIZES = tuning.Sizes(256, 512, 128, 256, heads=1)


def test_candidates_are_all_whose_tiles_divide_their_blocks():
    options = argparse.Namespace(
        queries=[512, 768], keys=[512], tile_queries=[512], tile_keys=[256], heads_per_step=[1, 2]
    )
    found = tune.candidates(options)
    assert {sizes.queries for sizes in found} == {512}
    assert {(sizes.heads, sizes.lp_scheduler) for sizes in found} == {(1, True), (1, False), (2, True), (2, False)}
    assert len(found) == 4


def test_the_best_comes_last_and_what_fails_is_said_and_left_out(capsys):
    def figure(choice):
        if choice == 3:
            raise RuntimeError("no room in VMEM")
        return float(choice % 4)

    assert tune.ranked(figure, [2, 3, 5, 7]) == [(3.0, 7), (2.0, 2), (1.0, 5)]
    assert "failed  3: no room in VMEM" in capsys.readouterr().out


def test_sizes_are_used_for_that_kernel_alone(monkeypatch):
    monkeypatch.setattr(tuning, "CHIPS", copy.deepcopy(tuning.CHIPS))
    monkeypatch.setattr(tuning, "_chip_table", lambda: next(iter(tuning.CHIPS.values())))
    problem = tune.Problem("forward", 1, 1024, 2, 1, 64, True, None)
    arrays, before = problem.arrays(), tuning.backward(*problem.arrays(), problem.mask)
    tune.use("forward", SIZES)
    assert tuning.forward(*arrays, problem.mask) == SIZES
    assert tuning.backward(*arrays, problem.mask) == before != SIZES


def test_the_clock_calls_with_arrays_of_those_shapes():
    calls = []

    def function(*arrays):
        calls.append([(array.shape, array.dtype) for array in arrays])
        return arrays[0] + 1

    arrays = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.float32)
    assert tune.clock(function, arrays, repeats=3) > 0
    assert calls == [[((2, 3), jnp.bfloat16), ((4,), jnp.float32)]] * 4


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_an_estimate_lies_between_the_peak_and_ten_times_that(kernel):
    pytest.importorskip("libtpu")
    problem = tune.Problem(kernel, 1, 1024, 2, 1, 128, False, None)
    with chip_process("v5e") as process:
        found = process.submit(tune.estimated, problem, "v5e", tuning.Sizes(512, 512, 512, 512)).result()
    products = {"forward": 2, "backward": 5}[kernel]
    least = 1e3 * products * 2 * 2 * 1024**2 * 128 / 197e12
    assert least < found < 10 * least
