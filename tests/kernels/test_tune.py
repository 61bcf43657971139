"""Choosing block sizes: what is tried, what is taken, and one estimate for a real chip."""

import argparse
import copy
import itertools

import jax
import jax.numpy as jnp
import pytest

from kernels import Mask, attention, tune
from kernels.attention.tpu import tuning
from kernels.static_estimate import CHIPS, chip_process, compile_program

SIZES = tuning.Sizes(256, 512, 128, 256, heads=1)


def test_candidates_are_all_whose_tiles_divide_their_blocks():
    sides = dict(queries=[512, 768], keys=[512], tile_queries=[512], tile_keys=[256])
    options = argparse.Namespace(kernel="forward", **sides, heads_per_step=[1, 2], diagonal_keys=[128, 256, 512, 192])
    found = tune.candidates(options)  # 512 is cut to the tile, and 192 divides no block
    assert {sizes[:4] for sizes in found} == {(512, 512, 512, 256)}
    choices = {(sizes.heads, sizes.diagonal_keys, sizes.lp_scheduler) for sizes in found}
    assert choices == set(itertools.product((1, 2), (128, 256), (True, False)))
    assert len(found) == 8


def test_the_backward_kernel_takes_one_head_at_a_time():
    sides = dict(queries=[512], keys=[512], tile_queries=[512], tile_keys=[512])
    found = tune.candidates(argparse.Namespace(kernel="backward", **sides, heads_per_step=[1, 2], diagonal_keys=[256]))
    assert [(sizes.heads, sizes.lp_scheduler) for sizes in found] == [(1, True), (1, False)]


def test_the_best_comes_last_and_what_fails_is_said_and_left_out(capsys):
    def figure(choice):
        if choice == 3:
            raise RuntimeError("no room in VMEM")
        return float(choice % 4)

    assert tune.ranked(figure, [2, 3, 5, 7]) == [(3.0, 7), (2.0, 2), (1.0, 5)]
    assert "failed  3: no room in VMEM" in capsys.readouterr().out


@pytest.mark.parametrize("documents", [None, (1000, 24)], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "none that is in the table"])
def test_sizes_are_used_for_that_kernel_alone_on_every_chip(monkeypatch, kind, documents):
    for table in ("CHIPS", "DEFAULT"):
        monkeypatch.setattr(tuning, table, copy.deepcopy(getattr(tuning, table)))
    problem = tune.Problem("forward", 1, 1024, 2, 1, 64, True, None, documents)
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        arrays, before = problem.arrays(), tuning.backward(*problem.arrays(), problem.mask)
        tune.use("forward", SIZES)
        assert tuning.forward(*arrays, problem.mask) == SIZES
        assert tuning.backward(*arrays, problem.mask) == before != SIZES


def test_packed_texts_are_told_apart():
    ids = tune.Problem("forward", 2, 5, 2, 1, 64, True, None, (3, 2)).mask.q_segment_ids
    assert ids.tolist() == [[1, 1, 1, 2, 2]] * 2


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
