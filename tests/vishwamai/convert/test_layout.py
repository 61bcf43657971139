"""Name tables: every parameter of ours and every tensor of theirs has one row, and rows keep every bit."""

import numpy as np
import pytest
from hf_folders import assert_same, model_config, random_parameters, tensors_of

from vishwamai import families
from vishwamai.checkpoint.layers import unstack
from vishwamai.config import ConfigError
from vishwamai.convert.parameters import abstract_parameters, deferred_arrays, layer_name

CASES = {
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "siglip": ("siglip", {}),
    "siglip without head": ("siglip", {"vision_use_head": False}),
    "parsit": ("parsit", {}),
    "parsit, last layer": ("parsit", {"vision_feature_layer": -1}),
    "parsit, linear projector": ("parsit", {"projector": "linear"}),
    "parsit, deep projector": ("parsit", {"projector": "mlp3x_gelu"}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    name, changes = request.param
    family = families.get(name)
    return family, model_config(name, **changes)


def test_every_row_is_used_exactly_once_in_each_direction(case):
    family, config = case
    rows = family.layout.rows(config)
    parameters = random_parameters(family.name, config)
    held = tensors_of(family.name, config, parameters)

    ours = [layer_name(name, layer) for row in rows for name in row.ours for layer in row.places]
    assert sorted(ours) == sorted(unstack(parameters)), "export reads each parameter, and each layer of it, once"
    theirs = [name for row in rows for *_, name in row.pairs()]
    assert len(theirs) == len(set(theirs)) == len(held), "import reads each tensor once"

    back = deferred_arrays(held, rows, abstract_parameters(family.build, config))
    whole = {name: array[(slice(None),) * len(array.shape)] for name, array in back.items()}
    assert_same(whole, {name: np.asarray(array) for name, array in unstack(parameters).items()})


def test_spellings_are_told_apart_by_the_names_alone(case):
    family, config = case
    layout = family.layout
    names = layout.names(config)
    for naming in layout.namings:
        spelled = [naming.spell(name) for name in names]
        assert len(set(spelled)) == len(names)
        assert layout.naming_of(config, spelled) == naming


def test_layers_behind_the_feature_layer_continue_the_numbers():
    config = model_config("parsit")
    pairs = {
        layer_name(row.ours[0], layer): name
        for row in families.get("parsit").layout.rows(config)
        for layer, _, name in row.pairs()
    }
    assert pairs["vision_tower.layers.1.mlp.fc1.bias"] == "vision_tower.encoder.layers.1.mlp.fc1.bias"
    assert pairs["vision_tower.unused_layers.0.mlp.fc1.bias"] == "vision_tower.encoder.layers.2.mlp.fc1.bias"


def test_factorised_positions_are_summed_and_can_only_be_exported():
    family = families.get("siglip")
    config = model_config("siglip", positions="factorised")
    parameters = random_parameters("siglip", config)
    held = tensors_of("siglip", config, parameters)
    table = held["embeddings.position_embedding.weight"].reshape(4, 4, 20)
    embeddings = parameters["embeddings"]
    rows, columns = (embeddings[f"{name}_embedding"]["embedding"].get_value() for name in ("row", "column"))
    np.testing.assert_array_equal(table[2, 3], rows[2] + columns[3])
    with pytest.raises(ConfigError, match="sum of embeddings.row_embedding.embedding and .*set positions: table"):
        deferred_arrays(held, family.layout.rows(config), abstract_parameters(family.build, config))


def test_the_architecture_finds_its_family():
    assert families.for_architecture("LlavaForConditionalGeneration").name == "parsit"
    assert families.for_architecture("SiglipModel").name == "siglip"
    with pytest.raises(ConfigError, match="no family reads the architecture 'GPT2LMHeadModel'; known: .*Qwen3"):
        families.for_architecture("GPT2LMHeadModel")


def test_what_llava_does_not_compute_is_named():
    unsupported = families.get("parsit").layout.unsupported
    data = families.get("parsit").data_config(max_length=64, image_size=(8, 24), datasets=[{"generated": "receipts"}])
    assert unsupported(model_config("parsit"), None) == []
    changes = dict(pooling="average_2x2", projector="linear", image_mask="prefix")
    parts = unsupported(model_config("parsit", **changes), data)
    for part, word in zip(
        parts, ["model.pooling=average_2x2", "projector=linear", "image_mask=prefix", "[8, 24]"], strict=True
    ):
        assert word in part
    fitting = data.model_copy(update={"image_size": (16, 16)})
    assert unsupported(model_config("parsit"), fitting) == []
