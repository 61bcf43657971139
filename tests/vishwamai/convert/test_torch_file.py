"""PyTorch's .bin files: the same bits as safetensors, and nothing that a pickle asks for is run."""

import builtins
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
from hf_folders import assert_same, read_folder, write_folder
from parity import torch

from vishwamai.config import ConfigError
from vishwamai.convert.from_hf import from_hf
from vishwamai.convert.source import open_source
from vishwamai.convert.to_hf import to_hf
from vishwamai.convert.weights import Weights

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def as_torch(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def write_bin(folder, tensors, files=1):
    """The tensors as PyTorch saves a model; in several files with their index."""
    names = sorted(tensors)
    if files == 1:
        torch.save({name: as_torch(tensors[name]) for name in names}, folder / BIN)
        return
    homes = {name: f"pytorch_model-{i % files + 1:05d}-of-{files:05d}.bin" for i, name in enumerate(names)}
    for file in set(homes.values()):
        torch.save({name: as_torch(tensors[name]) for name in names if homes[name] == file}, folder / file)
    (folder / BIN_INDEX).write_text(json.dumps({"weight_map": homes}))


@pytest.mark.parametrize("family, dtype", [("qwen3", "bfloat16"), ("qwen2", "float16"), ("mixtral", "float32")])
@pytest.mark.parametrize("files", [1, 3])
def test_a_model_of_bin_files_is_converted_to_the_last_bit(tmp_path, family, dtype, files):
    held = write_folder(tmp_path / "source", family, dtype=dtype)
    (tmp_path / "source" / "model.safetensors").unlink()
    write_bin(tmp_path / "source", held, files)
    from_hf(tmp_path / "source", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), held)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


def test_views_of_one_storage_and_parameters(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tied = torch.nn.Parameter(base.to(torch.bfloat16))
    held = {
        "turned": base.T,
        "part": base[1:3, ::2],
        "a": tied,
        "b": tied,
        "scalar": torch.tensor(2.5),
        "none": base[:0],
    }
    torch.save(held, tmp_path / BIN)
    weights = Weights(tmp_path)
    for name, tensor in held.items():
        assert_same({"x": weights[name]}, {"x": tensor.detach().float().numpy().astype(weights[name].dtype)})
    assert weights["a"].dtype.name == "bfloat16"


def test_safetensors_come_first(tmp_path):
    held = write_folder(tmp_path, "qwen3")
    (tmp_path / BIN).write_bytes(b"never opened")
    assert_same(dict(Weights(tmp_path)), held)


class Creates:
    """What a malicious file may hold: an object whose pickle is a call."""

    def __init__(self, path, function):
        self.call = (function, (f"touch {path}",) if function is os.system else (str(path), "w"))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, name", [(os.system, "system"), (builtins.open, "open")])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, function, name, zipped):
    write_folder(tmp_path / "source", "qwen3")
    (tmp_path / "source" / "model.safetensors").unlink()
    save = partial(torch.save, _use_new_zipfile_serialization=zipped)
    save({"model.norm.weight": Creates(tmp_path / "created", function)}, tmp_path / "source" / BIN)
    for use in (
        lambda: open_source(tmp_path / "source").tensors,
        lambda: from_hf(tmp_path / "source", tmp_path / "run"),
    ):
        with pytest.raises(ConfigError) as error:
            use()
        assert str(tmp_path / "source" / BIN) in str(error.value)
        if zipped:
            assert f".{name})" in str(error.value) and "is refused" in str(error.value)
    assert not (tmp_path / "created").exists() and not (tmp_path / "run").exists()
    # The test itself is not harmless: whoever unpickles it, runs it.
    torch.load(tmp_path / "source" / BIN, weights_only=False)
    assert (tmp_path / "created").exists()


def test_what_holds_no_tensors_is_named(tmp_path):
    for held in ({"state_dict": {"a": torch.ones(2)}}, [torch.ones(2)]):
        torch.save(held, tmp_path / BIN)
        with pytest.raises(ConfigError, match="something else than tensors by name: expected a model's state_dict"):
            Weights(tmp_path)
    torch.save({"a": torch.ones(2, dtype=torch.float64)}, tmp_path / BIN)
    with pytest.raises(ConfigError, match="a is torch.float64, expected one of F32, BF16, F16"):
        Weights(tmp_path)["a"]


def test_a_cut_file_and_one_of_an_old_pytorch_are_named(tmp_path):
    torch.save({"a": torch.ones(2000)}, path := tmp_path / BIN)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(
        ConfigError, match=r"pytorch_model.bin \(3,000 bytes\) can't be read by PyTorch .*fetch the file"
    ):
        Weights(tmp_path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match="if PyTorch before 1.6 wrote it, load and save it once with a newer one"):
        Weights(tmp_path)


def test_without_pytorch_it_says_what_to_install(tmp_path, monkeypatch):
    write_bin(tmp_path, {"a": np.ones(2, np.float32)})
    real = builtins.__import__

    def absent(name, *rest, **options):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        ConfigError, match=r"only be read with PyTorch: install it \(pip install 'vishwamai\[torch\]'\)"
    ):
        Weights(tmp_path)


def test_an_index_of_bin_files_is_checked_too(tmp_path):
    write_bin(tmp_path, {f"t{i}": np.ones(3, np.float32) for i in range(3)}, files=2)
    shutil.copy(tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ConfigError, match="00002-of-00002.bin lacks t1, which pytorch_model.bin.index.json promises"):
        Weights(tmp_path)
