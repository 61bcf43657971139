"""`vishwamai convert inspect`: every tensor of a folder or a run has a line, and no weights are read."""

import numpy as np
import pytest
from hf_folders import make_run, model_config, write_folder

from vishwamai.cli import main
from vishwamai.convert.inspect import Place, places
from vishwamai.convert.source import open_source


def by_tensor(folder):
    found = {place.tensor: place for place in places(open_source(folder))}
    assert len(found) == len(places(open_source(folder)))
    return found


def test_a_folder_with_experts_in_shards(tmp_path):
    held = write_folder(tmp_path, "qwen3_moe", shard=3000)
    found = by_tensor(tmp_path)
    assert found.keys() == held.keys()
    place = found["model.layers.2.mlp.experts.1.down_proj.weight"]
    # Layer 0 is dense and stands alone: layer 2 is the second one of the stack.
    assert (place.shape, place.dtype) == ("24x12", "BF16")
    assert (place.parameter, place.layer, place.expert) == ("layers.1::1.mlp.experts.down_proj", "1", "1")
    for name, tensor in held.items():
        assert (tmp_path / found[name].file).is_file() and found[name].shape == "x".join(map(str, tensor.shape))
    assert len({place.file for place in found.values()}) > 2


def test_a_run(tmp_path):
    make_run(tmp_path, "qwen3", dtype="bfloat16")
    place = by_tensor(tmp_path)["model.layers.1.self_attn.q_proj.weight"]
    shown = Place(place.tensor, "32x24", "bfloat16", "checkpoints/7", "layers.self_attn.q_proj.kernel", "1")
    assert place == shown


def test_what_has_no_place_is_shown_and_is_an_error(tmp_path, capsys):
    config = model_config("qwen3", tie_word_embeddings=True)
    held = write_folder(tmp_path / "plain", "qwen3", config)
    odd = {
        "lm_head.weight": held["model.embed_tokens.weight"] * 0,  # not even the same: that takes reading
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64),
        "model.odd": np.array(1.0, np.float32),
    }
    write_folder(tmp_path / "odd", "qwen3", config, extra=odd, leave=["model.norm.weight"])
    found = by_tensor(tmp_path / "odd")
    assert found["lm_head.weight"].parameter == "(repeats model.embed_tokens.weight)"
    assert found["model.layers.0.self_attn.rotary_emb.inv_freq"].parameter == "(left out)"
    assert found["model.odd"] == Place("model.odd", "scalar", "F32", "model.safetensors", "(left over)")
    assert found["model.norm.weight"] == Place("model.norm.weight", "", "", "(missing)", "norm.scale")
    assert main(["convert", "inspect", str(tmp_path / "odd")]) == 1
    said = capsys.readouterr()
    assert "model.odd is left over" in said.err and "model.norm.weight is missing" in said.err
    assert len(said.out.splitlines()) == len(found) + 1


@pytest.mark.parametrize("kind", ["published", "run"])
def test_the_command_reads_headers_only(tmp_path, capsys, monkeypatch, kind):
    if kind == "published":
        write_folder(tmp_path, "qwen3")
        monkeypatch.setattr(np, "memmap", None)
    else:
        make_run(tmp_path, "qwen3")
        for path in tmp_path.glob("checkpoints/7/parameters/ocdbt.process_0/d/*"):
            path.write_bytes(b"")
    assert main(["convert", "inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tensor", "shape", "dtype", "file", "parameter", "layer", "expert"]
    assert len(lines) == 26
    assert len({line.index(" layers.") for line in lines if " layers." in line}) == 1, "columns are aligned"


def test_a_place_that_is_none(tmp_path, capsys):
    assert main(["convert", "inspect", str(tmp_path)]) == 1
    assert "is neither a run" in capsys.readouterr().err
