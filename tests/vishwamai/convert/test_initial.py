"""`init_from`: the whole model or its parts, from runs and from Hugging Face folders."""

import numpy as np
import pytest
from flax import nnx
from hf_folders import MODELS, make_run, model_config, write_folder

from vishwamai import families
from vishwamai.config import ConfigError
from vishwamai.convert.initial import load_parameters

PARSIT = families.get("parsit")


def flat(state):
    return {".".join(path): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)


def part(state, prefix):
    return {name: array for name, array in flat(state).items() if name.startswith(prefix)}


def test_a_whole_run_with_another_feature_layer_and_mask(tmp_path):
    parameters = make_run(tmp_path / "run", "parsit", dtype="bfloat16")
    assert_equal(flat(load_parameters(tmp_path / "run", PARSIT, model_config("parsit"))), flat(parameters))
    changed = model_config("parsit", vision_feature_layer=-1, image_mask="prefix")
    found = flat(load_parameters(str(tmp_path / "run"), PARSIT, changed))
    name = "vision_tower.{}layers.mlp.fc1.kernel"
    both = [flat(parameters)[name.format(kind)] for kind in ("", "unused_")]
    np.testing.assert_array_equal(found[name.format("")], np.concatenate(both).astype(np.float32))


def test_a_mixture_that_is_trained_in_another_way(tmp_path):
    parameters, family = make_run(tmp_path / "run", "qwen3_moe"), families.get("qwen3_moe")
    sparse = MODELS["qwen3_moe"]["mixture"]
    changes = dict(router_aux_loss_coef=0.1, router_z_loss_coef=0.01, capacity_factor=1.25, aux_loss_scope="layer")
    other = model_config("qwen3_moe", mixture=sparse | changes)
    assert_equal(flat(load_parameters(tmp_path / "run", family, other)), flat(parameters))
    other = model_config("qwen3_moe", mixture=sparse | dict(norm_topk_prob=False))
    with pytest.raises(ConfigError, match="mixture.norm_topk_prob: the weights have True, the config says False"):
        load_parameters(tmp_path / "run", family, other)


def test_factorised_positions_from_a_run_that_has_them(tmp_path):
    config = model_config("parsit", vision={**MODELS["parsit"]["vision"], "positions": "factorised"})
    parameters = make_run(tmp_path / "run", "parsit", config)
    assert_equal(flat(load_parameters(tmp_path / "run", PARSIT, config)), flat(parameters))
    with pytest.raises(ConfigError, match="vision.positions: the weights have factorised, the config says table"):
        load_parameters(tmp_path / "run", PARSIT, model_config("parsit"))


def test_parts_from_folders_of_their_own(tmp_path):
    write_folder(tmp_path / "siglip", "siglip", naming="vision_model")
    language = make_run(tmp_path / "qwen3", "qwen3", seed=3)
    sources = {"vision_tower": str(tmp_path / "siglip"), "language_model": str(tmp_path / "qwen3")}
    found = load_parameters(sources, PARSIT, model_config("parsit"))
    assert set(found) == {"vision_tower", "language_model"}
    assert_equal(part(found, "language_model."), {f"language_model.{k}": v for k, v in flat(language).items()})
    whole = flat(load_parameters(tmp_path / "siglip", families.get("siglip"), model_config("siglip")))
    kernel = "layers.self_attn.q_proj.kernel"
    np.testing.assert_array_equal(flat(found)[f"vision_tower.{kernel}"], whole[kernel][:2])
    np.testing.assert_array_equal(flat(found)[f"vision_tower.unused_{kernel}"], whole[kernel][2:])


def test_parts_out_of_a_whole_model(tmp_path):
    parameters = make_run(tmp_path / "run", "parsit")
    found = load_parameters({"multi_modal_projector": tmp_path / "run"}, PARSIT, model_config("parsit"))
    assert_equal(flat(found), part(parameters, "multi_modal_projector."))
    wider = model_config("parsit", text={**MODELS["parsit"]["text"], "hidden_size": 32})
    tower = load_parameters({"vision_tower": tmp_path / "run"}, PARSIT, wider)
    assert_equal(flat(tower), part(parameters, "vision_tower."))
    with pytest.raises(ConfigError, match=r"linear_1.kernel has shape \(20, 24\), the config makes it \(20, 32\)"):
        load_parameters({"multi_modal_projector": tmp_path / "run"}, PARSIT, wider)
    with pytest.raises(ConfigError, match="(?s)init_from.language_model: .*another.*hidden_size: the weights have 24"):
        load_parameters({"language_model": tmp_path / "run"}, PARSIT, wider)


def test_a_part_is_taken_whole_or_not_at_all(tmp_path):
    make_run(tmp_path / "run", "parsit", model_config("parsit", projector="mlp3x_gelu"))
    with pytest.raises(ConfigError, match="projector.linear_3.kernel: the weights have 1, the config makes it 0"):
        load_parameters({"multi_modal_projector": tmp_path / "run"}, PARSIT, model_config("parsit"))
    make_run(tmp_path / "text", "qwen3")
    shallow = model_config("qwen3", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="layers.{layer}.mlp.*: the weights have 2, the config makes it 1"):
        load_parameters({"layers": tmp_path / "text"}, families.get("qwen3"), shallow)


def test_a_head_that_the_config_does_not_carry_is_left_behind(tmp_path):
    write_folder(tmp_path, "siglip")
    config = model_config("parsit", vision={**MODELS["parsit"]["vision"], "vision_use_head": False})
    found = flat(load_parameters({"vision_tower": str(tmp_path)}, PARSIT, config))
    assert not any(name.startswith("vision_tower.head") for name in found)


def test_what_does_not_fit_is_said(tmp_path):
    write_folder(tmp_path / "siglip", "siglip")
    write_folder(tmp_path / "qwen3", "qwen3", model_config("qwen3", num_hidden_layers=1, rope_theta=5e5))
    config = model_config("parsit")
    for source, message in [
        (str(tmp_path / "qwen3"), "init_from: .* holds a qwen3, expected a parsit"),
        ({"vision_tower": str(tmp_path / "qwen3")}, "init_from.vision_tower: .* holds a qwen3, expected a siglip"),
        ({"multi_modal_projector": str(tmp_path / "qwen3")}, "holds a qwen3, expected a parsit"),
        (
            {"vision": str(tmp_path / "siglip")},
            "init_from.vision: .*no such part; its parts: language_model, multi_modal",
        ),
        (
            {"language_model": str(tmp_path / "qwen3")},
            "(?s)num_hidden_layers: the weights have 1, the config says 2.*rope_theta: .*500000.0",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_parameters(source, PARSIT, config)
