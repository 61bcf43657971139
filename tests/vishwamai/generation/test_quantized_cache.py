"""Caches in 8 bits: how near their logits are, what they hold, and how much memory it is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.decode_attention.quantized import QuantizedVectors, quantize
from vishwamai.data.batch import text_batch
from vishwamai.generation import Draft, Generation, left_padded
from vishwamai.models.config import LayerType, TextConfig
from vishwamai.models.transformer import Transformer

CONFIG = TextConfig(
    vocab_size=97, hidden_size=40, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3, sliding_window=5,
    layer_types=(LayerType.SLIDING, LayerType.FULL),
)  # fmt: skip
PROMPTS = [[5, 9, 11, 2, 40, 41, 42, 7, 7, 3, 12], [3], [8, 1, 60, 61, 62]]
COUNT = 24
DTYPES = ["int8", "float8_e4m3fn"]


def split(**changes):
    model = Transformer(CONFIG.model_copy(update=changes), rngs=nnx.Rngs(1))
    model.embed_tokens.embedding[...] *= 0.1  # or a tied output repeats what came in
    return nnx.split(model)


def run(model, count=COUNT, **options):
    options = dict(end_ids=[], pad_id=0) | options
    generation = Generation(*model, left_padded(PROMPTS, 0), max_new_tokens=count, **options)
    generation.advance(count)
    return generation


@partial(jax.jit, static_argnums=(0, 3, 4))
def read(graph, parameters, batch, cache_dtype, at_a_time):
    """A cache of the first four tokens."""
    model, before = nnx.merge(graph, parameters), jax.tree.map(lambda x: x[:, :4], batch)
    x, mask = model.embed(before), model.mask(before)
    return model.prefill(x, before.positions, mask, batch.segment_ids, at_a_time, cache_dtype)[1]


@partial(jax.jit, static_argnums=0)
def further(graph, parameters, cache, batch):
    """Logits of these tokens, and the cache with them."""
    model = nnx.merge(graph, parameters)
    x, mask = model.embed(batch), cache.mask(batch.segment_ids)
    x, cache, _ = model.decoder(x, batch.positions, mask, cache, layers=model.one_by_one())
    return model.unembed(x), cache


def forced(graph, parameters, batch, cache_dtype, at_a_time):
    """Logits of the tokens behind the first four, read so many at a time, and the cache at the end."""
    cache, found = read(graph, parameters, batch, cache_dtype, at_a_time), []
    for start in range(4, batch.tokens.shape[1], at_a_time):
        more = jax.tree.map(lambda x, start=start: x[:, start : start + at_a_time], batch)
        logits, cache = further(graph, parameters, cache, more)
        found.append(logits)
    return jnp.concatenate(found, axis=1), cache


def text(rows=2, length=34):
    return text_batch(np.random.default_rng(0).integers(1, 97, (rows, length)))


@pytest.mark.parametrize("dtype, bound", [("int8", 0.02), ("float8_e4m3fn", 0.12)])
def test_logits_are_near_those_of_a_whole_cache(dtype, bound):
    graph, parameters = split(initializer_range=0.15)
    expected, _ = forced(graph, parameters, text(), None, 1)
    found, _ = forced(graph, parameters, text(), dtype, 1)
    together, _ = forced(graph, parameters, text(), dtype, 3)  # drafts read several at a time
    error, between = (jnp.sqrt(jnp.mean((found - x) ** 2) / jnp.var(expected)) for x in (expected, together))
    assert bound / 10 < error < bound
    assert between < bound / 10  # rounding takes a component to its neighbour now and then


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_a_cache_holds_each_key_and_value_quantised_by_itself(dtype, at_a_time):
    for window in (5, None):
        # One layer: deeper ones have seen attention to what was quantised.
        kinds = (LayerType.SLIDING if window else LayerType.FULL,)
        model = split(num_hidden_layers=1, sliding_window=window, layer_types=kinds)
        _, whole = forced(*model, text(), None, at_a_time)
        _, found = forced(*model, text(), dtype, at_a_time)
        assert found.layers[0].slots == whole.layers[0].slots == (window + at_a_time - 1 if window else 34)
        for got, x in zip(found.layers[0], whole.layers[0], strict=True):
            expected = quantize(x, dtype)
            assert got.values.dtype == expected.values.dtype == jnp.dtype(dtype)
            np.testing.assert_allclose(got.scales, expected.scales, rtol=1e-6)
            wide = [np.asarray(y.values).astype(np.float32) for y in (got, expected)]
            np.testing.assert_allclose(*wide, rtol=0.13, atol=1)  # rounding of the key can change its last bit


@pytest.mark.slow
def test_half_the_memory_of_bfloat16():
    model = split(head_dim=64)
    size = lambda found: sum(x.nbytes for x in jax.tree.leaves(found.state.cache.layers))  # noqa: E731
    whole = size(run(model, 1, dtype=jnp.bfloat16))
    for dtype in DTYPES:
        assert size(run(model, 1, dtype=jnp.bfloat16, cache_dtype=dtype)) / whole == (64 + 4) / (2 * 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_prompt_is_attended_to_as_it_was_computed(dtype):
    model = split()
    whole, found = (run(model, 1, keep_log_probabilities=True, cache_dtype=x) for x in (None, dtype))
    np.testing.assert_array_equal(found.log_probabilities, whole.log_probabilities)
    assert all(isinstance(x, QuantizedVectors) for layer in found.state.cache.layers for x in layer)


def test_greedy_tokens_are_mostly_those_of_a_whole_cache():
    model = split()
    whole, found = run(model), run(model, cache_dtype="int8")
    same = found.tokens == whole.tokens
    assert same.mean() > 0.5 and len(np.unique(found.tokens)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_and_samples_change_nothing(dtype):
    model = split()
    expected = run(model, cache_dtype=dtype)
    noisy = jax.tree.map(lambda x: x * (1 + 0.07 * np.random.default_rng(0).standard_normal(x.shape)), model[1])
    found = run(model, cache_dtype=dtype, draft=Draft(model[0], noisy))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert 0 < found.accepted < found.proposed  # some were taken back
    twice = run(model, cache_dtype=dtype, samples=2)
    np.testing.assert_array_equal(twice.tokens, expected.tokens.repeat(2, axis=0))


def test_a_type_that_is_not_there():
    with pytest.raises(ValueError, match="cache_dtype='int4': expected int8, float8_e4m3fn, or None"):
        run(split(), 1, cache_dtype="int4")
