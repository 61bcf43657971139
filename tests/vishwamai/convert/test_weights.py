"""safetensors files: what we write the library reads, what it writes we read, and damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from hf_folders import assert_same, read_folder
from safetensors.numpy import save_file

from vishwamai.config import ConfigError
from vishwamai.convert.weights import INDEX, ShardWriter, Weights


def some_tensors():
    random = np.random.default_rng(0)
    return {
        "a.weight": random.normal(size=(3, 5)).astype(np.float32),
        "b.weight": random.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "c.weight": random.normal(size=(2, 1, 3)).astype(np.float16),
        "d.scalar": np.array(2.5, np.float32),
        "e.empty": np.zeros((0, 4), np.float32),
        "é.transposed": np.asfortranarray(random.normal(size=(4, 6)).astype(np.float32)),
    }


def write(folder, tensors, **options):
    writer = ShardWriter(folder, list(tensors), **options)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def test_the_library_reads_what_we_write(tmp_path):
    write(tmp_path, some_tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(read_folder(tmp_path), some_tensors())
    assert_same(dict(Weights(tmp_path)), some_tensors())


def test_we_read_what_the_library_writes(tmp_path):
    # The library would write a transposed array's memory as it lies.
    contiguous = {name: tensor.copy("C") for name, tensor in some_tensors().items()}
    save_file(contiguous, tmp_path / "model.safetensors")
    assert_same(dict(Weights(tmp_path)), some_tensors())


def test_shards_hold_no_more_than_they_may(tmp_path):
    tensors = {f"layers.{i}.weight": np.full((10, 10), i, np.float32) for i in range(7)}
    tensors["large"] = np.ones((30, 30), np.float32)  # larger than a shard: alone in one
    write(tmp_path, tensors, shard_bytes=900)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert sorted(index["weight_map"]) == sorted(tensors)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert_same(read_folder(tmp_path), tensors)
    assert_same(dict(Weights(tmp_path)), tensors)


def test_a_type_without_a_name_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, ["x"])
    with pytest.raises(TypeError, match="x is complex64; safetensors holds"):
        writer.write("x", np.zeros(2, np.complex64))


@pytest.mark.parametrize("kind, width", [("F64", 8), ("I8", 1), ("F8_E4M3", 1)])
def test_a_type_that_would_not_be_kept_is_refused(tmp_path, kind, width):
    """JAX would round float64 in silence; integers and float8 are quantised weights, whose scales we don't know."""
    tensors = {"a": {"dtype": kind, "shape": [4], "data_offsets": [0, 4 * width]}}
    header = json.dumps(tensors).encode().ljust(80)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * width))
    with pytest.raises(ConfigError, match=f"a is {kind}, expected one of F32, BF16, F16"):
        Weights(tmp_path)["a"]


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path, damage):
    save_file(some_tensors(), path := tmp_path / "model.safetensors")
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[:-9], "header": b"\xff" * 8 + whole[8:], "empty": b"", "text": b"version https://git-lfs"}[damage]
    )
    with pytest.raises(ConfigError, match=r"model.safetensors \([\d,]+ bytes\) is damaged or cut short .*fetch"):
        Weights(tmp_path)


def test_what_an_index_promises_must_be_there(tmp_path):
    tensors = {f"t{i}": np.zeros(100, np.float32) for i in range(3)}
    write(tmp_path, tensors, shard_bytes=500)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks model-00002-of-00003.safetensors, which model.safetensors.index.json"):
        Weights(tmp_path)
    save_file({"other": np.zeros(1, np.float32)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(ConfigError, match="00002-of-00003.safetensors lacks t1, which"):
        Weights(tmp_path)
    for text in ('{"weight_map"', "[]", '{"weight_map": ["t0"]}', '{"weight_map": {"t0": 1}}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ConfigError, match="is no index of model.safetensors"):
            Weights(tmp_path)


def test_a_folder_without_safetensors_says_what_it_holds(tmp_path):
    with pytest.raises(ConfigError, match="has neither model.safetensors nor .*; found no weights at all"):
        Weights(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="found model.gguf. Save the model with Transformers' save_pretrained"):
        Weights(tmp_path)
