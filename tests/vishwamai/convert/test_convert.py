"""`convert from-hf` and `convert to-hf`: the same bits, names and files in both directions."""

import json
import re

import numpy as np
import pytest
import yaml
from hf_folders import (
    MODELS,
    SPARSE,
    TEXT,
    assert_same,
    make_run,
    model_config,
    random_parameters,
    read_folder,
    tensors_of,
    write_folder,
)

from vishwamai import VishwamAI, families
from vishwamai.checkpoint import save_parameters
from vishwamai.cli import main
from vishwamai.config import ConfigError
from vishwamai.convert.from_hf import from_hf
from vishwamai.convert.source import download, open_source
from vishwamai.convert.to_hf import to_hf

TEXT_TOWER = {
    "text_model.embeddings.token_embedding.weight": np.ones((5, 4), np.float32),
    "logit_scale": np.ones(1, np.float32),
    "logit_bias": np.ones(1, np.float32),
}
POSITION_IDS = {"vision_tower.vision_model.embeddings.position_ids": np.arange(16)[None]}
# family, spelling, type, tensors beside the model's (None: left out), bytes in a shard
SOURCES = {
    "qwen3 in bfloat16": ("qwen3", "today", "bfloat16", {}, 10**9),
    "qwen3 in float32 shards": ("qwen3", "today", "float32", {}, 4000),
    "llama in bfloat16 shards": ("llama", "today", "bfloat16", {}, 3000),
    "mistral in float16": ("mistral", "today", "float16", {}, 10**9),
    "qwen2 in bfloat16": ("qwen2", "today", "bfloat16", {}, 10**9),
    "siglip in float16": ("siglip", "today", "float16", {}, 10**9),
    "siglip as published": ("siglip", "vision_model", "float32", {}, 10**9),
    "siglip with its text tower": ("siglip", "vision_model", "float32", TEXT_TOWER, 10**9),
    "parsit in bfloat16": ("parsit", "today", "bfloat16", {}, 10**9),
    "parsit in shards": ("parsit", "today", "bfloat16", {}, 3000),
    "parsit as published": ("parsit", "vision_model", "float32", POSITION_IDS, 10**9),
    "parsit as in memory": ("parsit", "nested", "float32", {}, 10**9),
    "parsit as in memory, older": ("parsit", "nested_vision_model", "float32", {}, 10**9),
}


@pytest.mark.parametrize("case", SOURCES.values(), ids=SOURCES.keys())
def test_there_and_back_is_equal_to_the_last_bit(tmp_path, case):
    family, naming, dtype, extra, shard = case
    held = write_folder(tmp_path / "source", family, None, dtype, naming, extra, shard=shard)
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"b": 1,\n  "a": "ü"}')
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id":\n [1, 2]}')
    (tmp_path / "source" / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    from_hf(tmp_path / "source", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "back")
    expected = {name: tensor for name, tensor in held.items() if name not in extra}
    assert_same(read_folder(tmp_path / "back"), expected)
    for path in (tmp_path / "source").glob("*.j*"):
        if path.name != "model.safetensors.index.json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    # And the other way about: a run made of the exported folder holds the same parameters.
    from_hf(tmp_path / "back", tmp_path / "again")
    assert_same(dict(open_source(tmp_path / "again").tensors), dict(open_source(tmp_path / "run").tensors))


@pytest.mark.parametrize("family", MODELS)
def test_a_run_of_our_own_keeps_its_bits(tmp_path, family):
    config = model_config(family)
    parameters = make_run(tmp_path / "run", family, config)
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text(TOKENIZER)
    to_hf(tmp_path / "run", tmp_path / "exported", shard_bytes=5000)
    assert len(list((tmp_path / "exported").glob("model-*"))) > 2
    from_hf(tmp_path / "exported", tmp_path / "back")
    assert open_source(tmp_path / "back").config == config
    assert_same(dict(open_source(tmp_path / "back").tensors), dict(tensors_of(family, config, parameters)))


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"a": 0, "<image>": 60}, "unk_token": "a"},
        "added_tokens": [],
    }
)


def test_a_tied_matrix_held_twice_is_written_twice(tmp_path):
    config = model_config("qwen3", tie_word_embeddings=True)
    held = write_folder(tmp_path / "plain", "qwen3", config)
    twice = {"lm_head.weight": held["model.embed_tokens.weight"]}
    held = write_folder(tmp_path / "source", "qwen3", config, extra=twice)
    from_hf(tmp_path / "source", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), held)
    write_folder(tmp_path / "untied", "qwen3", config, extra={"lm_head.weight": twice["lm_head.weight"] * 2})
    with pytest.raises(ConfigError, match="ties lm_head.weight to model.embed_tokens.weight, but the two differ"):
        VishwamAI.from_pretrained(tmp_path / "untied")


def test_a_full_siglip_is_exported_as_its_vision_tower(tmp_path):
    write_folder(tmp_path / "source", "siglip", None, "float32", "vision_model", TEXT_TOWER)
    path = tmp_path / "source" / "config.json"
    vision = {key: value for key, value in json.loads(path.read_text()).items() if key != "architectures"}
    path.write_text(json.dumps({"architectures": ["SiglipModel"], "model_type": "siglip", "vision_config": vision}))
    from_hf(tmp_path / "source", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == ["SiglipVisionModel"] and written["hidden_size"] == 20
    assert not [name for name in read_folder(tmp_path / "back") if not name.startswith("vision_model.")]


def test_what_only_training_asks_for_changes_no_config(tmp_path):
    write_folder(tmp_path / "source", "qwen3_moe")
    path = tmp_path / "source" / "config.json"
    source = json.loads(path.read_text())
    theta = source.pop("rope_parameters")["rope_theta"]  # as older files have it
    path.write_text(json.dumps({**source, "rope_theta": theta}))
    from_hf(tmp_path / "source", tmp_path / "run")
    tree = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    tree["model"]["mixture"] |= {"capacity_factor": 1.25, "router_z_loss_coef": 0.01, "aux_loss_scope": "layer"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    to_hf(tmp_path / "run", tmp_path / "back")
    before, after = ((tmp_path / name / "config.json").read_bytes() for name in ("source", "back"))
    assert after == before


def test_what_a_run_changed_is_updated_and_the_rest_is_kept(tmp_path):
    write_folder(tmp_path / "source", "qwen3", dtype="bfloat16")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": "bfloat16", "eos_token_id": 5}))
    from_hf(tmp_path / "source", tmp_path / "run")
    config = model_config("qwen3", max_position_embeddings=99)
    parameters = make_run(tmp_path / "run", "qwen3", config, dtype="float32", seed=9)
    to_hf(tmp_path / "run", tmp_path / "back")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "back"))
    # Weights are float32 now: Transformers would round them to what the config says.
    changed = {"dtype": "float32", "torch_dtype": "float32", "max_position_embeddings": 99}
    assert after == before | changed
    assert_same(read_folder(tmp_path / "back"), dict(tensors_of("qwen3", config, parameters)))


def test_the_newest_checkpoint_or_the_one_named(tmp_path):
    first = make_run(tmp_path / "run", "qwen3")
    second = random_parameters("qwen3", model_config("qwen3"), seed=1)
    save_parameters(tmp_path / "run", second, step=8)
    for place, parameters in [("run", second), ("run/checkpoints/7", first), ("run/checkpoints/8", second)]:
        opened = open_source(tmp_path / place)
        assert_same(dict(opened.tensors), dict(tensors_of("qwen3", opened.config, parameters)))


def test_names_left_over_and_missing_are_listed_with_the_nearest(tmp_path):
    wrong = {"model.layers.0.self_attn.q_nrom.weight": np.ones(8, np.float32)}
    write_folder(tmp_path, "qwen3", extra=wrong, leave=["model.layers.0.self_attn.q_norm.weight"])
    with pytest.raises(ConfigError) as error:
        VishwamAI.from_pretrained(tmp_path)
    message = str(error.value)
    assert "q_norm.weight is missing; nearest: model.layers.0.self_attn.q_nrom.weight" in message
    assert "q_nrom.weight is left over; nearest: model.layers.0.self_attn.q_norm.weight" in message


def test_many_wrong_names_are_counted(tmp_path):
    write_folder(tmp_path, "qwen3", model_config("qwen3", num_hidden_layers=1))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 4}))
    with pytest.raises(ConfigError, match=r"(?s)layers.1.*is missing.*and 25 more are missing"):
        VishwamAI.from_pretrained(tmp_path)


def test_a_shape_that_the_config_does_not_have_is_named(tmp_path):
    write_folder(tmp_path, "qwen3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 48}))
    with pytest.raises(ConfigError, match=r"gate_proj.weight has shape \(40, 24\).*the config makes it \(24, 48\)"):
        VishwamAI.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' can't be computed here, expected .*silu"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"attention_bias": True}, "self_attn.q_proj.bias is missing"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types names chunked_attention, which can't be computed"),
        ({"layer_types": ["sliding_attention"] * 2}, "use_sliding_window=False with layers of sliding_attention"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_scaling: type='longrope' can't be computed"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters: rope_type='dynamic'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 0.5}},
            "rope_parameters: factor: .* greater than or equal",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "holds quantised weights"),
        ({"architectures": ["GPT2LMHeadModel"]}, "no family reads the architecture 'GPT2LMHeadModel'; known: .*Llama"),
        ({"model_type": "qwen2"}, "model_type='qwen2' can't be computed here, expected 'qwen3'"),
        ({"architectures": None}, "names no `architectures`"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ],
)
def test_a_config_that_would_be_computed_differently_is_refused(tmp_path, change, message):
    write_folder(tmp_path, "qwen3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        VishwamAI.from_pretrained(tmp_path)


def test_older_configs_mean_what_they_meant():
    layout = families.get("qwen3").layout
    old = layout.write_config(model_config("qwen3")) | {
        "rope_theta": 1e6,
        "rope_scaling": None,
        "rope_parameters": None,
    }
    assert layout.read_config(old).rope_theta == 1e6
    assert layout.read_config({"num_key_value_heads": None, "num_attention_heads": 8}).num_key_value_heads == 8
    stretched = layout.read_config(old | {"rope_scaling": {"type": "linear", "factor": 4}})
    assert (stretched.rope_theta, stretched.rope_scaling.rope_type, stretched.rope_scaling.factor) == (1e6, "linear", 4)
    yarn = layout.read_config(old | {"max_position_embeddings": 99, "rope_scaling": {"type": "yarn", "factor": 4}})
    assert yarn.rope_scaling.original_max_position_embeddings == 99  # as in Transformers
    vision = families.get("siglip").layout.read_config({"vision_config": {}, "model_type": "siglip"})
    assert (vision.hidden_size, vision.image_size, vision.vision_use_head) == (768, 224, True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_feature_select_strategy": "default"}, "would drop the first patch"),
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer=\[-1, -2\] joins several layers"),
        ({"vision_feature_layer": 0}, r"vision_feature_layer=-4 is not in \[-3, -1\]"),
        ({"multimodal_projector_bias": False}, "the projector has biases"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision_config: model_type='clip_vision_model'"),
        ({"vision_config": {"image_size": [16, 32]}}, r"image_size=\[16, 32\] is not square"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type='llama'"),
        ({"text_config": None}, "has no text_config"),
        ({"image_token_index": 61}, "image_token_id=61 is outside vocab_size=61"),
    ],
)
def test_a_llava_that_parsit_does_not_compute_is_refused(change, message):
    layout = families.get("parsit").layout
    with pytest.raises(ConfigError, match=message):
        layout.read_config(layout.write_config(model_config("parsit")) | change)


def test_export_refuses_what_transformers_does_not_compute(tmp_path):
    make_run(tmp_path / "run", "parsit", model_config("parsit", pooling="average_2x2", image_mask="prefix"))
    with pytest.raises(ConfigError, match="(?s)LlavaForConditionalGeneration does not compute.*pooling.*image_mask"):
        to_hf(tmp_path / "run", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    "family, part, message",
    [
        ("qwen3", {"qk_norm": False}, "Qwen3ForCausalLM does not compute.*model.qk_norm=False"),
        ("qwen2", {"attention_bias": "none"}, "model.attention_bias=none: Qwen2ForCausalLM has qkv"),
        ("llama", {"sliding_window": 4}, "model.sliding_window=4: LlamaForCausalLM has None"),
        ("mistral", {"mlp_bias": True}, "model.mlp_bias=True"),
        ("parsit", {"text": TEXT | {"mlp_bias": True}}, "model.text.mlp_bias=True: Qwen3ForCausalLM has False"),
        ("qwen3_moe", {"mixture": SPARSE | {"scoring_func": "sigmoid"}}, "model.mixture.scoring_func=sigmoid"),
        ("qwen3_moe", {"mixture": SPARSE | {"n_shared_experts": 1}}, "model.mixture.n_shared_experts=1"),
        (
            "qwen3_moe",
            {"mixture": SPARSE | {"num_experts": 4, "n_group": 2}},
            "model.mixture.n_group=2: Qwen3MoeForCausalLM has 1",
        ),
    ],
)
def test_export_refuses_a_decoder_of_another_family(tmp_path, family, part, message):
    make_run(tmp_path / "run", family, model_config(family, **part))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        to_hf(tmp_path / "run", tmp_path / "exported")


def test_export_refuses_images_of_a_size_that_the_positions_do_not_stand_for(tmp_path):
    make_run(tmp_path / "run", "parsit")
    path = tmp_path / "run" / "config.yaml"
    data = {"max_length": 64, "image_size": [8, 24], "datasets": [{"generated": "receipts"}]}
    run = {"run_dir": "run", "tokenizer": "none", "training": {"steps": 1, "batch_size": 1}, "data": data}
    path.write_text(path.read_text() + yaml.safe_dump(run))
    with pytest.raises(ConfigError, match=r"(?s)does not compute.*data.image_size=\[8, 24\].*those of 16 x 16 pixels"):
        to_hf(tmp_path / "run", tmp_path / "exported")


def test_a_run_without_its_tokenizer_is_not_exported(tmp_path):
    make_run(tmp_path / "run", "qwen3")
    with pytest.raises(ConfigError, match="Transformers needs the tokenizer beside the weights: no tokenizer in"):
        to_hf(tmp_path / "run", tmp_path / "exported")


def test_the_command_says_what_it_did_and_what_is_wrong(tmp_path, capsys):
    write_folder(tmp_path / "source", "qwen3")
    source, run = str(tmp_path / "source"), str(tmp_path / "run")
    assert main(["convert", "from-hf", source, run]) == 0
    assert capsys.readouterr().out == f"{source} (qwen3) -> {run}: 25 tensors\n"
    for arguments, message in [
        (["from-hf", source, run], "exists and is not empty"),
        (["from-hf", run, str(tmp_path / "x")], "is a run already"),
        (["to-hf", source, str(tmp_path / "x")], "is a Hugging Face folder already"),
        (
            ["to-hf", str(tmp_path / "nothing"), str(tmp_path / "x")],
            "no folder .*nothing, and it is no Hugging Face id",
        ),
        (["to-hf", str(tmp_path), str(tmp_path / "x")], "is neither a run .* nor a Hugging Face folder"),
    ]:
        assert main(["convert", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and re.search(message, error), error
    assert not (tmp_path / "x").exists()


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    write_folder(tmp_path / "source", "qwen3")

    def full(error):
        def write(*_):
            raise error

        return write

    # As TensorStore says it, and as the operating system does.
    told = ValueError('RESOURCE_EXHAUSTED: Error writing "a/0.0": Failed to write: No space left on device')
    monkeypatch.setattr("vishwamai.convert.from_hf.save_deferred", full(told))
    with pytest.raises(ConfigError, match="run could not be written: no space left on device"):
        from_hf(tmp_path / "source", tmp_path / "run")
    monkeypatch.undo()
    from_hf(tmp_path / "source", tmp_path / "run")
    monkeypatch.setattr("vishwamai.convert.weights.ShardWriter.write", full(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="back could not be written: No space left on device"):
        to_hf(tmp_path / "run", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ConfigError, match="there is no folder Qwen/Qwen3-0.6B, and .* hub can't be reached") as error:
        VishwamAI.from_pretrained("Qwen/Qwen3-0.6B")
    assert "`hf download Qwen/Qwen3-0.6B --local-dir DIR`" in str(error.value)


@pytest.mark.parametrize("kind, fetched", [("safetensors", 1), ("bin", 2)])
def test_bin_files_are_fetched_where_there_are_no_others(tmp_path, monkeypatch, kind, fetched):
    asked = []

    def snapshot(place, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / f"model.{kind}").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert download("Qwen/Qwen3-0.6B") == tmp_path
    assert asked[1:] == ["pytorch_model*.bin"][: fetched - 1] and "*.bin" not in asked[0]


def test_experts_of_a_layer_are_of_one_type(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    held = write_folder(tmp_path / "source", "qwen3_moe", dtype="bfloat16")
    write_folder(tmp_path / "source", "qwen3_moe", extra={name: held[name].astype(np.float32)})
    with pytest.raises(ConfigError, match=f"{name} is float32.*expected one type for all experts of a layer"):
        VishwamAI.from_pretrained(tmp_path / "source")


def test_another_familys_weights_are_refused(tmp_path):
    write_folder(tmp_path, "siglip")
    with pytest.raises(ConfigError, match="holds a siglip, expected a .*llama or mistral or mixtral or qwen2 or qwen3"):
        VishwamAI.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="dtype 'float8' is not one of float32, bfloat16"):
        VishwamAI.from_pretrained(tmp_path, dtype="float8")
