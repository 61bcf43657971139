"""Choosing block sizes: what is tried, what is taken, and one estimate for a real chip."""

import argparse
import copy

import jax
import jax.numpy as jnp
import pytest

tuning = pytest.importorskip("kernels.attention.tpu.tuning", reason="attention has no backend for TPUs yet")

from kernels import Mask, attention, tune  # noqa: E402
from kernels.static_estimate import CHIPS, chip_process, compile_program  # noqa: E402

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


# Rows, T, heads, key heads, H and the values' width: none is in the table, none is a whole number of blocks.
ODD = {
    "heads of 256": (1, 5000, 6, 2, 256, 256),
    "a short row": (3, 100, 4, 4, 64, 64),
    "values narrower than keys": (1, 2500, 4, 4, 192, 128),
    "five queries to a key head": (1, 1300, 5, 1, 80, 80),
}


def with_gradient(q, k, v):
    return jax.value_and_grad(lambda q, k, v: attention(q, k, v, Mask(causal=True), backend="tpu").sum(), (0, 1, 2))(
        q, k, v
    )


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_shapes_that_nobody_tuned_fit_every_chip(chip):
    pytest.importorskip("libtpu")
    with chip_process(chip) as process:
        for batch, length, heads, kv_heads, width, v_width in ODD.values():
            sizes = (heads, width), (kv_heads, width), (kv_heads, v_width)
            arrays = [jax.ShapeDtypeStruct((batch, length, *size), jnp.bfloat16) for size in sizes]
            program = process.submit(compile_program, with_gradient, arrays).result()
            names = [kernel.name for kernel in program.kernels]
            assert names[0] == "attention_forward" and set(names[1:]) == {"attention_backward"}


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--help"])
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 0
    assert "--chip" in capsys.readouterr().out


def test_without_a_tpu_it_asks_for_a_chip(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "forward"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "there is no TPU here: say for which --chip to estimate" in capsys.readouterr().err
