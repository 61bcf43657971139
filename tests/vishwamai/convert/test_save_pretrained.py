"""`model.save_pretrained`: a folder for Transformers, whatever the model was opened from."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_folders import assert_same, make_run, read_folder, write_folder

from vishwamai import VishwamAI
from vishwamai.config import ConfigError
from vishwamai.convert.from_hf import from_hf
from vishwamai.convert.to_hf import to_hf

TOKENIZER = Path(__file__).parents[3] / "configs" / "tokenizers" / "parsit_tiny"


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mixtral"])
@pytest.mark.parametrize("converted", [False, True], ids=["a published folder", "a converted one"])
def test_it_is_the_folder_that_was_opened(tmp_path, family, converted):
    write_folder(tmp_path / "source", family, dtype="bfloat16")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": 7}\n')
    place = tmp_path / "source"
    if converted:
        from_hf(place, place := tmp_path / "run")
    VishwamAI.from_pretrained(place, dtype="bfloat16").save_pretrained(tmp_path / "saved")
    assert_same(read_folder(tmp_path / "saved"), read_folder(tmp_path / "source"))
    for path in (tmp_path / "source").glob("*.json"):
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes(), path.name


def test_of_a_run_it_is_what_to_hf_writes(tmp_path):
    make_run(tmp_path / "run", "qwen3_moe")
    shutil.copytree(TOKENIZER, tmp_path / "run" / "tokenizer")
    VishwamAI.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved")
    to_hf(tmp_path / "run", tmp_path / "exported")
    names = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "saved").iterdir())
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name


def test_changed_parameters_are_saved_in_their_type(tmp_path):
    write_folder(tmp_path / "source", "qwen3", dtype="bfloat16")
    model = VishwamAI.from_pretrained(tmp_path / "source", dtype="float32")
    model.parameters = jax.tree.map(lambda x: x * 2, model.parameters)
    model.save_pretrained(tmp_path / "saved")
    again, ids = VishwamAI.from_pretrained(tmp_path / "saved"), np.arange(12)[None]
    np.testing.assert_array_equal(again(ids), model(ids))
    assert '"dtype": "float32"' in (tmp_path / "saved" / "config.json").read_text()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        model.save_pretrained(tmp_path / "saved")
