"""A step of cached decoding, compiled for four TPUs that are not here: our kernel reads the cache where it lies."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tpu_chips import devices
from uncached import uncached

from vishwamai.models.cache import KeysValues, KVCache
from vishwamai.models.config import LayerType, TextConfig
from vishwamai.models.transformer import Transformer
from vishwamai.parallel.mesh import AXES
from vishwamai.parallel.sharding import parameter_shardings, row_sharding

pytestmark = pytest.mark.slow
CONFIG = TextConfig(
    vocab_size=2048, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, qk_norm=True, sliding_window=1024,
    layer_types=(LayerType.SLIDING, LayerType.FULL),
)  # fmt: skip
ROWS, SLOTS = 8, 8064


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("sizes, count", [(dict(tensor=4), 1), (dict(data=2, tensor=2), 1), (dict(fsdp=4), 4)], ids=str)
def test_decoding_reads_the_cache_where_it_lies(sizes, count, cache_dtype):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = Mesh(np.array(devices("v5e")).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    graph, parameters = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0))))
    like = lambda place, x, dtype=None: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place)  # noqa: E731
    parameters = jax.tree.map(partial(like, dtype=jnp.bfloat16), parameter_shardings(parameters, mesh), parameters)
    rows, heads = row_sharding(mesh), NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
    layers = []
    for slots in (1024 + count - 1, SLOTS):
        pair = KeysValues(*(jax.ShapeDtypeStruct((ROWS, 8, slots, 128), jnp.bfloat16) for _ in range(2)))
        pair = jax.eval_shape(lambda pair: pair.quantized(cache_dtype), pair) if cache_dtype else pair
        layers.append(jax.tree.map(partial(like, heads), pair))
    ids = lambda width: jax.ShapeDtypeStruct((ROWS, width), jnp.int32, sharding=rows)  # noqa: E731
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=rows)  # of each row, as with drafts
    cache = KVCache(tuple(layers), ids(SLOTS), lengths)

    def step(parameters, cache, tokens, positions):
        model = nnx.merge(graph, parameters)
        x, mask = model.embed_ids(tokens, jnp.bfloat16), cache.mask(jnp.ones_like(tokens))
        x, cache, _ = model.decoder(x, positions, mask, cache)
        return model.unembed(x), cache

    with uncached(), jax.set_mesh(mesh):
        program = jax.jit(step, donate_argnums=1).lower(parameters, cache, ids(count), ids(count)).compile()
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 2 and "decode_attention" in text
    moved = [line for line in text.splitlines() if re.search(r"(all-gather|all-to-all|permute)(-start)?\(", line)]
    of_slots = rf"[\[,]({SLOTS}|{1024 + count - 1})[\],]"
    assert not [line for line in moved if re.search(of_slots, line.split("(")[0])]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers[1])) / 4
    assert program.memory_analysis().temp_size_in_bytes < held / 2
