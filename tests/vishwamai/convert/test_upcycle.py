"""A dense checkpoint as a mixture: at first the same function, then one that learns."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hf_folders import make_run, model_config, write_folder

from vishwamai import VishwamAI, cli
from vishwamai.config import ConfigError
from vishwamai.convert.source import open_source
from vishwamai.convert.to_hf import to_hf
from vishwamai.convert.upcycle import upcycle

TOKENIZER = Path(__file__).parents[3] / "configs" / "tokenizers" / "parsit_tiny"
IDS = np.random.default_rng(0).integers(0, 61, (2, 23))


@pytest.mark.parametrize("dense, sparse", [("qwen3", "qwen3_moe"), ("mistral", "mixtral")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_what_the_dense_model_did(tmp_path, dense, sparse, dtype):
    write_folder(tmp_path / "dense", dense, dtype=dtype)
    assert upcycle(tmp_path / "dense", tmp_path / "mixture", num_experts=4, top_k=2).name == sparse
    before, after = (VishwamAI.from_pretrained(tmp_path / name) for name in ("dense", "mixture"))
    np.testing.assert_allclose(after(IDS), before(IDS), atol=2e-5)
    arrays = open_source(tmp_path / "mixture").arrays
    assert arrays["layers.0.mlp.experts.up_proj"].shape == (4, 24, 40)
    assert {str(array.dtype) for array in arrays.values()} == {dtype}
    routers = [arrays[f"layers.{i}.mlp.gate.kernel"][:, :].astype(np.float32) for i in (0, 1)]
    assert np.abs(routers[0] - routers[1]).max() > 0.01 and np.std(routers) == pytest.approx(0.02, rel=0.2)


def test_the_seed_decides_the_routers(tmp_path):
    write_folder(tmp_path / "dense", "qwen3")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(tmp_path / "dense", tmp_path / name, num_experts=4, top_k=2, seed=seed)
    routers = [open_source(tmp_path / name).arrays["layers.0.mlp.gate.kernel"][:, :] for name in "abc"]
    assert np.array_equal(*routers[:2]) and not np.array_equal(*routers[1:])


def test_a_run_becomes_a_mixture_that_is_exported(tmp_path, capsys):
    make_run(tmp_path / "run", "qwen3")
    shutil.copytree(TOKENIZER, tmp_path / "run" / "tokenizer")
    call = ["upcycle", str(tmp_path / "run"), str(tmp_path / "mixture"), "--experts", "3", "--top-k", "1"]
    assert cli.main(call) == 0
    assert "(qwen3_moe): 3 experts, 1 for each token" in capsys.readouterr().out
    to_hf(tmp_path / "mixture", tmp_path / "exported")
    exported = VishwamAI.from_pretrained(tmp_path / "exported")
    np.testing.assert_allclose(exported(IDS), VishwamAI.from_pretrained(tmp_path / "run")(IDS), atol=2e-5)


@pytest.mark.parametrize(
    "family, changes, experts, message",
    [
        ("qwen3_moe", {}, 4, "is a mixture already, expected a dense text model"),
        ("siglip", {}, 4, "holds a siglip, expected a dense text model"),
        ("qwen3", {}, 1, "num_experts_per_tok=2 is more than num_experts=1"),
        ("qwen2", {}, 4, "(?s)no family computes .* with mixtures:.*mixtral: model.attention_bias=qkv"),
    ],
)
def test_what_can_not_become_one(tmp_path, family, changes, experts, message):
    make_run(tmp_path / "run", family, model_config(family, **changes))
    with pytest.raises(ConfigError, match=message):
        upcycle(tmp_path / "run", tmp_path / "mixture", num_experts=experts, top_k=2)
    assert not (tmp_path / "mixture").exists()
