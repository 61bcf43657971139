"""Generation on 8 simulated devices: the tokens of one device, and caches stay where they lie."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from vishwamai.generation import Draft, Generation, left_padded
from vishwamai.generation.decoding import proceed
from vishwamai.models.config import LayerType, TextConfig
from vishwamai.models.transformer import Transformer
from vishwamai.parallel.mesh import MeshConfig, make_mesh
from vishwamai.parallel.sharding import parameter_shardings

CONFIG = TextConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3, sliding_window=8,
    layer_types=(LayerType.SLIDING, LayerType.FULL),
)  # fmt: skip
PROMPTS = [[5, 9, 11, 2, 40, 41, 42, 7, 7, 3, 12], [3], [8, 1, 60, 61, 62], [33, 12]]
COUNT = 21


def started(model, prompts, mesh=None, draft=False, **options):
    graph, parameters = model
    if mesh is not None:
        parameters = jax.device_put(parameters, parameter_shardings(parameters, mesh))
    options |= dict(max_new_tokens=COUNT, end_ids=[], pad_id=0, draft=Draft(graph, parameters, 3) if draft else None)
    return Generation(graph, parameters, left_padded(prompts, 0), **options)


@pytest.fixture(scope="module")
def model():
    model = Transformer(CONFIG, rngs=nnx.Rngs(1))
    model.embed_tokens.embedding[...] *= 0.1  # or a tied output repeats what came in
    return nnx.split(model)


@pytest.mark.parametrize(
    "axes, rows, options",
    [
        pytest.param(dict(data=2, fsdp=2, tensor=2), 4, {}, marks=pytest.mark.slow),
        (dict(data=2, tensor=4), 4, dict(draft=True, cache_dtype="int8")),  # four devices share two key heads
        (dict(fsdp=4, tensor=2), 3, {}),
    ],
    ids=["rows and heads", "fewer key heads than devices", "rows that can't be split"],
)
def test_tokens_are_those_of_one_device(model, axes, rows, options):
    expected = started(model, PROMPTS[:rows], **options)
    expected.advance(COUNT)
    mesh = make_mesh(MeshConfig(**axes))
    with jax.set_mesh(mesh):
        found = started(model, PROMPTS[:rows], mesh, **options)
        found.advance(COUNT)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert len(np.unique(found.tokens)) > 10


def test_caches_stay_where_they_lie(model):
    with jax.set_mesh(mesh := make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = started(model, PROMPTS, mesh, draft=True, cache_dtype="int8")
        assert found.state.cache.length.shape == (4,)
        arguments = found._models, found._layers, found.state, np.int32(COUNT), found._settings, found._ending
        program = proceed.lower(*arguments, draft_tokens=3).compile().as_text()
    split = jax.tree.map(lambda x: x.addressable_shards[0].data.shape[:2], found.state.cache.layers)
    assert {shape for layer in split for pair in layer for shape in pair} == {(1, 1)}
    moved = [line for line in program.splitlines() if re.search(r"(all-gather|all-to-all|permute)(-start)?\(", line)]
    assert moved  # of weights, and of logits
    assert {layer.slots for layer in found.state.cache.layers} == {11, 43}  # no other dimension is so long
    assert not [line for line in moved if re.search(r"[\[,](11|43)[\],]", line.split("(")[0])]
    assert not [line for line in moved if " s8[" in line]  # nor what is written into them
