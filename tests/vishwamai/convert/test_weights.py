"""safetensors files: what we write the library reads, what it writes we read, and damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from hf_folders import assert_same, read_folder
from safetensors import SafetensorError, safe_open
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


def _file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _tensors(**places) -> bytes:
    return json.dumps(
        {name: {"dtype": "F32", "shape": [n], "data_offsets": [a, b]} for name, (n, a, b) in places.items()}
    ).encode()


TWO = _tensors(a=(2, 0, 8), b=(3, 8, 20))
END = 8 + len(TWO)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"\x10\x00\x00", "it ends at byte 3, and 8 bytes should say how long its header is"),
        (b"version https://git-lfs.github.com/spec/v1", "first 8 bytes, b'version ', are no length of a header"),
        (_file(TWO)[:40], f"it ends at byte 40, and its header at byte {END}"),
        (_file(TWO), f"it ends at byte {END}, and a is byte {END} to {END + 8}; so are the 1 tensors behind it"),
        (_file(TWO, bytes(19)), f"it ends at byte {END + 19}, and b is byte {END + 8} to {END + 20}"),
        (_file(TWO, bytes(21)), f"b, its last tensor, ends at byte {END + 20}, {END + 21} are there"),
        (_file(b'{"a": 1,, }'), "its header is no JSON from byte 16 on"),
        (_file(b'{"\xff": 1}'), "its header is no text from byte 10 on"),
        (_file(b"[]"), "its header is list, not an object"),
        (_file(b'{"a": {"dtype": "F32"}}'), "its header has no dtype, shape and data_offsets for a"),
        (_file(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}'), "no dtype, shape and data_offsets"),
        (_file(_tensors(a=(2, 0, 8), b=(3, 4, 16)), bytes(16)), r"a ends at byte \d+, and b, the next one, begins at"),
        (_file(_tensors(a=(2, 0, 8), b=(3, 9, 21)), bytes(21)), r"a ends at byte \d+, and b, the next one, begins at"),
        (_file(_tensors(a=(3, 0, 8)), bytes(8)), r"a, F32 \[3\], needs 12 bytes, and its place is byte \d+ to \d+"),
    ],
)
def test_where_a_file_is_damaged_is_said(tmp_path, content, problem):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as error:
        Weights(tmp_path)
    assert str(error.value).startswith(f"{path} ({len(content):,} bytes) is damaged")
    with pytest.raises(SafetensorError):  # and the library refuses it too
        safe_open(path, framework="numpy")


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path):
    """The library would take the last one."""
    (tmp_path / "model.safetensors").write_bytes(_file(TWO[:-1] + b", " + TWO[1:], bytes(20)))
    with pytest.raises(ConfigError, match="its header says twice: a"):
        Weights(tmp_path)


def test_what_an_index_does_not_name_counts_too(tmp_path):
    """It would be dropped in silence, or one of two be taken."""
    tensors = {f"t{i}": np.full(100, i, np.float32) for i in range(3)}
    write(tmp_path, tensors, shard_bytes=500)
    save_file({"t2": tensors["t2"], "more": tensors["t0"]}, tmp_path / "model-00003-of-00003.safetensors")
    assert_same(dict(Weights(tmp_path)), tensors | {"more": tensors["t0"]})
    save_file({"t2": tensors["t2"], "t0": tensors["t0"]}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(ConfigError, match="00003.safetensors holds t0, and so does model-00001-of-00003.safetensors"):
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
