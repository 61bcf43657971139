"""The table of backends: preference, refusals with their reasons, and the platform that is compiled for."""

import logging
import sys

import jax
import pytest

from kernels import backends
from kernels.backends import Backend, choose, lazily, left_to_xla, target

TABLE = {
    "fast": Backend(("cpu", "tpu"), lambda size: f"fast {size}", lambda size: "it is odd" if size % 2 else None),
    "gpu": Backend(("gpu",), lambda size: f"gpu {size}"),
    "slow": Backend(("cpu",), lambda size: f"slow {size}"),
    "reference": Backend((), lambda size: f"reference {size}"),
}


@pytest.mark.parametrize(
    ("asked", "size", "expected"),
    [("auto", 2, "fast 2"), ("auto", 3, "slow 3"), ("slow", 2, "slow 2"), ("gpu", 2, "gpu 2"),
     ("reference", 2, "reference 2")],
)  # fmt: skip
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


def test_an_explicit_choice_that_cannot_is_an_error():
    with pytest.raises(ValueError, match="sum's backend 'fast' can't do this: it is odd"):
        choose("sum", TABLE, "fast", 3)
    with pytest.raises(ValueError, match="sum has no backend 'quick'; there are: auto, fast, gpu, slow, reference"):
        choose("sum", TABLE, "quick", 3)


def test_nothing_for_a_platform():
    with pytest.raises(ValueError, match="sum has no backend for cpu, as fast can't: it is odd"):
        choose("sum", {"fast": TABLE["fast"]}, "auto", 3)


@pytest.mark.parametrize(("platform", "expected"), [("tpu", "tpu"), ("cuda", "gpu"), ("cpu", "cpu")])
def test_what_counts_is_the_platform_that_is_compiled_for(platform, expected):
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    assert target() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
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
