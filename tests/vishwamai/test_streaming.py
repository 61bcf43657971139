"""Checkpoints that are written and read in parts: the same bits and shapes as those that are written at once."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from vishwamai import checkpoint
from vishwamai.checkpoint import CheckpointError, Deferred, save_deferred, stored_arrays, streaming
from vishwamai.checkpoint.layers import unstack
from vishwamai.checkpoint.streaming import groups


@pytest.fixture
def small(monkeypatch):
    """Parts and groups of hundreds of bytes."""
    monkeypatch.setattr(streaming, "GROUP_BYTES", 2000)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 500)


@pytest.fixture
def parameters():
    random = np.random.default_rng(0)

    def make(axes, *shape):
        return nnx.Param(random.normal(size=shape).astype(ml_dtypes.bfloat16), axes=axes)

    layers = {
        "kernel": make(("embed", "mlp"), 3, 26, 34),
        "experts": make((None, "embed", "mlp"), 3, 5, 6, 7),
        "scale": make(("norm",), 3, 7),
    }
    return nnx.State({"layers": layers, "scale": make(("norm",), 7)})


def deferred(parameters, asked=None):
    def read(name, array, index):
        if asked is not None:
            asked.append((name, array[index].nbytes))
        return array[index]

    flat = {name: np.asarray(array) for name, array in unstack(parameters).items()}
    return {
        name: Deferred(array.shape, array.dtype, lambda index, name=name, array=array: read(name, array, index))
        for name, array in flat.items()
    }


def test_what_is_written_in_parts_is_read_whole(tmp_path, parameters, small):
    asked = []
    save_deferred(tmp_path, deferred(parameters, asked))
    loaded = checkpoint.load_parameters(tmp_path, 0, jax.eval_shape(lambda: parameters))
    jax.tree.map(lambda a, b: assert_array_equal(np.asarray(a), np.asarray(b), strict=True), loaded, parameters)
    assert max(size for _, size in asked) <= 500
    assert sum(size for _, size in asked) == sum(array.nbytes for array in deferred(parameters).values())
    assert sum(name == "layers.1.experts" for name, _ in asked) == 5, "one expert after the other"


@pytest.mark.parametrize("kind", ["at once", "in parts"])
def test_arrays_are_read_when_they_are_asked_for(tmp_path, parameters, small, kind, monkeypatch):
    if kind == "at once":
        checkpoint.save_parameters(tmp_path, parameters)
    else:
        save_deferred(tmp_path, deferred(parameters))
    fetched = []
    restored = streaming._restored
    monkeypatch.setattr(streaming, "_restored", lambda *args: fetched.append([*args[2]]) or restored(*args))
    stored = stored_arrays(tmp_path, 0, jax.eval_shape(lambda: parameters))
    assert fetched == []
    for name, array in deferred(parameters).items():
        assert (stored[name].shape, stored[name].dtype) == (array.shape, array.dtype)
        part = tuple(slice(1, None) for _ in array.shape)
        assert_array_equal(stored[name][part], array[part], strict=True)
        assert_array_equal(stored[name][()], array[()], strict=True)
    layers = [[f"layers.{i}.{name}" for i in range(3)] for name in ("experts", "scale")]
    kernels = [["layers.0.kernel"], ["layers.1.kernel"], ["layers.2.kernel"]]
    assert sorted(fetched) == sorted([*layers, *kernels, ["scale"]]), "each once, small ones together"


def test_groups_are_of_what_fits(small):
    sizes = [900, 900, 900, 5000, 1, 1999, 1]
    assert list(groups(sizes, lambda size: size)) == [[900, 900], [900], [5000], [1, 1999], [1]]


def test_a_part_that_cannot_be_read_fails_the_save(tmp_path):
    def read(index):
        raise OSError("the source is gone")

    with pytest.raises(Exception, match="the source is gone"):
        save_deferred(tmp_path, {"a": Deferred((2, 2), np.dtype(np.float32), read)})
    assert checkpoint.steps(tmp_path) == []


def test_damage_is_told_when_an_array_is_read(tmp_path, parameters):
    checkpoint.save_parameters(tmp_path, parameters)
    abstract = jax.eval_shape(lambda: parameters)
    stored = stored_arrays(tmp_path, 0, abstract)
    for path in tmp_path.glob("checkpoints/0/parameters/**/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="checkpoints/0 is damaged: "):
        stored["scale"][()]
    with pytest.raises(CheckpointError, match=r"no checkpoint 3; complete are: \[0\]"):
        stored_arrays(tmp_path, 3, abstract)
