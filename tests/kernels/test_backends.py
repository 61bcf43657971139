"""The table of backends: preference, refusals with their reasons, and the platform that is compiled for."""

import functools
import logging
import sys

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import attention, backends
from kernels.backends import Backend, choose, lazily, left_to_xla, target

TABLE = {
    "fast": Backend(("cpu", "tpu"), lambda size: f"fast {size}", lambda size: "it is odd" if size % 2 else None),
    "gpu": Backend(("gpu",), lambda size: f"gpu {size}"),
    "slow": Backend(("cpu",), lambda size: f"slow {size}"),
    "reference": Backend((), lambda size: f"reference {size}"),
}


def mesh_of(platform: str):
    kind = "TPU v5 lite" if platform == "tpu" else "any"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)


@pytest.mark.parametrize(
    ("asked", "size", "expected"),
    [("auto", 2, "fast 2"), ("auto", 3, "slow 3"), ("slow", 2, "slow 2"), ("reference", 2, "reference 2")],
)
def test_the_first_that_can_or_the_one_asked_for(asked, size, expected):
    assert choose("sum", TABLE, asked, size)(size) == expected


def test_the_log_says_once_which_and_why(caplog):
    backends._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels"):
        for size in (2, 3, 2, 3):
            choose("sum", TABLE, "auto", size)
    assert [record.message for record in caplog.records] == [
        "sum on cpu: backend fast",
        "sum on cpu: backend slow, as fast can't: it is odd",
    ]


def test_what_never_ran_is_taken_where_the_environment_or_the_caller_says_so(caplog, monkeypatch):
    table = {"new": Backend(("cpu",), lambda size: f"new {size}", untried=True), **TABLE}
    backends._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels"):
        assert choose("sum", table, "auto", 2)(2) == "fast 2"
        assert choose("sum", table, "new", 2)(2) == "new 2"
        monkeypatch.setenv("KERNELS_UNTRIED", "1")
        assert choose("sum", table, "auto", 2)(2) == "new 2"
    assert [record.message for record in caplog.records] == [
        "sum on cpu: backend fast, as new has never run on one: KERNELS_UNTRIED=1 takes it",
        "sum on cpu: backend new",
    ]


def test_an_explicit_choice_that_cannot_is_an_error():
    with pytest.raises(ValueError, match="sum's backend 'fast' can't do this: it is odd"):
        choose("sum", TABLE, "fast", 3)
    with pytest.raises(ValueError, match="sum has no backend 'quick'; there are: auto, fast, gpu, slow, reference"):
        choose("sum", TABLE, "quick", 3)


def test_a_choice_for_another_platform_is_an_error_unless_it_is_the_one_compiled_for():
    with pytest.raises(
        ValueError, match="'gpu' can't do this: it is for gpu, and this is compiled for cpu; ask for auto"
    ):
        choose("sum", TABLE, "gpu", 2)
    with jax.sharding.use_abstract_mesh(mesh_of("cuda")):
        assert choose("sum", TABLE, "gpu", 2)(2) == "gpu 2"
        with pytest.raises(ValueError, match="it is for cpu, and this is compiled for gpu; ask for auto or .* gpu. To"):
            choose("sum", TABLE, "slow", 2)


def test_attention_for_a_tpu_says_that_there_is_none():
    q = np.zeros((1, 8, 1, 8), np.float32)
    with pytest.raises(ValueError, match="attention's backend 'tpu' can't do this: it is for tpu, .* compiled for cpu"):
        attention(q, q, q, backend="tpu")
    run = functools.partial(attention, backend="tpu")
    with jax.sharding.use_abstract_mesh(mesh_of("tpu")):
        assert jax.eval_shape(run, q, q, q).shape == q.shape
    with pltpu.force_tpu_interpret_mode():
        assert jax.eval_shape(run, q, q, q).shape == q.shape


def test_nothing_for_a_platform():
    with pytest.raises(ValueError, match="sum has no backend for cpu, as fast can't: it is odd"):
        choose("sum", {"fast": TABLE["fast"]}, "auto", 3)


@pytest.mark.parametrize(("platform", "expected"), [("tpu", "tpu"), ("cuda", "gpu"), ("cpu", "cpu")])
def test_what_counts_is_the_platform_that_is_compiled_for(platform, expected):
    assert target() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        assert target() == expected


def test_what_xla_splits():
    """A mesh outside of a shard_map; inside, each device has its part."""
    assert not left_to_xla()
    with jax.set_mesh(jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        found = [left_to_xla()]
        jax.eval_shape(
            jax.shard_map(lambda x: (found.append(left_to_xla()), x)[1], in_specs=jax.P("x"), out_specs=jax.P("x")),
            jax.ShapeDtypeStruct((8,), "float32"),
        )
    assert found == [True, False]


def test_a_module_is_imported_when_it_is_called(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    function = lazily("colorsys", "rgb_to_hsv")
    assert "colorsys" not in sys.modules
    assert function(0, 0, 0) == (0, 0, 0)
