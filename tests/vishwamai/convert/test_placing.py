"""Weights straight onto a mesh: the same bits as on one device, and of each tensor only what a shard needs."""

import jax
import numpy as np
import pytest
from hf_folders import make_run, model_config, write_folder
from numpy.testing import assert_array_equal

from vishwamai import families
from vishwamai.checkpoint import Deferred
from vishwamai.convert.initial import load_parameters
from vishwamai.convert.parameters import abstract_parameters
from vishwamai.convert.placing import place
from vishwamai.convert.source import open_source
from vishwamai.experiment import MeshConfig
from vishwamai.parallel.mesh import make_mesh
from vishwamai.parallel.sharding import parameter_shardings

MESHES = [MeshConfig(fsdp=2, tensor=4), MeshConfig(data=4, tensor=2)]


@pytest.fixture(params=MESHES, ids=str)
def mesh(request):
    return make_mesh(request.param)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "parsit"])
@pytest.mark.parametrize("kind", ["published", "run"])
def test_shards_are_those_of_the_whole(tmp_path, mesh, family, kind):
    if kind == "published":
        write_folder(tmp_path, family)
    else:
        make_run(tmp_path, family, dtype="bfloat16")
    source = open_source(tmp_path)
    shardings = parameter_shardings(source.abstract, mesh)
    whole, sharded = source.parameters("bfloat16"), source.parameters("bfloat16", shardings)
    split = 0
    for one, parts, sharding in zip(*map(jax.tree.leaves, (whole, sharded, shardings)), strict=True):
        assert len(one.devices()) == 1 and parts.sharding == sharding
        split += not sharding.is_fully_replicated
        for shard in parts.addressable_shards:
            assert_array_equal(np.asarray(shard.data), np.asarray(one)[shard.index])
    assert split > 3


def test_init_from_lies_on_the_mesh(tmp_path, mesh):
    write_folder(tmp_path / "siglip", "siglip")
    make_run(tmp_path / "qwen3", "qwen3", dtype="bfloat16")
    family, config = families.get("parsit"), model_config("parsit")
    shardings = parameter_shardings(abstract_parameters(family.build, config), mesh)
    sources = {"vision_tower": str(tmp_path / "siglip"), "language_model": str(tmp_path / "qwen3")}
    whole, sharded = (load_parameters(sources, family, config, to) for to in (None, shardings))
    assert set(sharded) == {"vision_tower", "language_model"}
    jax.tree.map(lambda a, b: assert_array_equal(np.asarray(a), np.asarray(b)), whole, sharded)
    kernel = sharded["language_model"]["layers"]["mlp"]["up_proj"]["kernel"].get_value()
    assert kernel.sharding == shardings["language_model"]["layers"]["mlp"]["up_proj"]["kernel"].get_value()


def test_a_shard_reads_its_part_once():
    """Of 8 shards on 2 x 4 devices each is read once, replicas are not read again, and no array is read whole."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    abstract = abstract_parameters(families.get("qwen3").build, model_config("qwen3"))["layers"]["mlp"]["up_proj"]
    numbers = np.arange(24 * 40, dtype=np.float32).reshape(24, 40)
    asked = []

    def read(index):
        asked.append(index)
        return numbers[index]

    arrays = {"kernel": Deferred((24, 40), numbers.dtype, read)}
    leaf = abstract["kernel"]
    single = type(abstract)({"kernel": leaf.replace(jax.ShapeDtypeStruct((24, 40), np.float32))})
    placed = place(arrays, single, "float32", parameter_shardings(single, mesh))
    assert_array_equal(np.asarray(jax.tree.leaves(placed)[0]), numbers)
    assert sorted((a.start, a.stop, b.start, b.stop) for a, b in asked) == [
        (i, i + 12, j, j + 10) for i in (0, 12) for j in (0, 10, 20, 30)
    ]


def test_parameters_may_be_given_away(tmp_path):
    """XLA takes an aligned buffer of the host as its own: what comes of donating it must not change what is kept."""
    write_folder(tmp_path, "qwen3", dtype="float32")
    source = open_source(tmp_path)
    first, second = (source.parameters("float32") for _ in range(2))
    expected = jax.tree.map(lambda x: np.array(x) + 1, second)
    moved = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(first)
    jax.tree.map(lambda a, b: assert_array_equal(np.asarray(a), b), moved, expected)
    jax.tree.map(lambda a, b: assert_array_equal(np.asarray(a) + 1, b), second, expected)
