"""Caches that hold only a window, against the whole text run anew."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_and_slow
from flax import nnx

from vishwamai.data.batch import text_batch
from vishwamai.generation import Generation, Sampling, left_padded
from vishwamai.models.cache import KVCache
from vishwamai.models.config import LayerType, TextConfig
from vishwamai.models.transformer import Transformer

CONFIG = TextConfig(
    vocab_size=97, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3, sliding_window=5,
)  # fmt: skip
SLIDING, FULL = LayerType.SLIDING, LayerType.FULL
PROMPTS = [[5, 9, 11, 2, 40, 41, 42, 7, 7, 3, 12], [3], [8, 1, 60, 61, 62]]  # longer, shorter, as long as the window
COUNT = 24
KINDS = {
    "all": ({}, [5, 5]),
    "of 1": (dict(sliding_window=1), [1, 1]),
    "almost the text": (dict(sliding_window=15), [15, 15]),
    "longer than the text": (dict(sliding_window=60), [40, 40]),
    "sliding, full": (dict(layer_types=(SLIDING, FULL), num_hidden_layers=3), [5, 40, 5]),
    "full, two sliding": (dict(layer_types=(FULL, SLIDING, SLIDING), num_hidden_layers=4), [40, 5, 5, 40]),
}


def split(**changes):
    model = Transformer(CONFIG.model_copy(update=changes), rngs=nnx.Rngs(1))
    model.embed_tokens.embedding[...] *= 0.1  # or a tied output repeats what came in
    return nnx.split(model)


@partial(jax.jit, static_argnums=0)
def hidden_states(graph, parameters, batch):
    return nnx.merge(graph, parameters).hidden_states(batch)


def uncached(model, prompts, count):
    """Greedy tokens, all texts run anew for each."""
    module, texts = nnx.merge(*model), [list(prompt) for prompt in prompts]
    for _ in range(count):
        width = 40 - np.array([len(text) for text in texts])
        batch = text_batch(*([fill(text, n) for text, n in zip(texts, width, strict=True)] for fill in (padded, there)))
        x = hidden_states(*model, batch)[np.arange(len(texts)), 39 - width]
        for text, token in zip(texts, np.argmax(module.unembed(x), axis=-1).tolist(), strict=True):
            text.append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@partial(jax.jit, static_argnums=0)
def further(graph, parameters, cache, tokens, positions):
    """What the decoder makes of these tokens, and the cache with them."""
    model, mask = nnx.merge(graph, parameters), cache.mask(jnp.ones_like(tokens))
    return model.decoder(model.embed_ids(tokens), positions, mask, cache)[:2]


def padded(text, count):
    return [*text, *[0] * count]


def there(text, count):
    return [1] * len(text) + [0] * count


def run(model, prompts=PROMPTS, **options):
    generation = Generation(*model, left_padded(prompts, 0), max_new_tokens=COUNT, end_ids=[], pad_id=0, **options)
    generation.advance(COUNT)
    return generation


@pytest.mark.parametrize("changes, slots", quick_and_slow(KINDS, ["of 1", "sliding, full"]))
def test_layers_hold_their_window_and_say_what_no_cache_says(changes, slots):
    model = split(**changes)
    got = run(model)  # prompts of 16 tokens, most of it padding, and 24 more
    assert [layer.keys.shape for layer in got.state.cache.layers] == [(3, 2, n, 8) for n in slots]
    assert [layer.values.shape for layer in got.state.cache.layers] == [(3, 2, n, 8) for n in slots]
    assert got.tokens.tolist() == uncached(model, PROMPTS, COUNT)
    for row, prompt in zip(got.tokens, PROMPTS, strict=True):
        np.testing.assert_array_equal(run(model, [prompt]).tokens[0], row)
    assert len(set(got.tokens.ravel().tolist())) > 10


def test_samples_share_a_prefill_into_a_window():
    model = split()
    got = run(model, samples=2, sampling=Sampling(temperature=1.0, seed=5))
    assert [layer.slots for layer in got.state.cache.layers] == [5, 5]
    assert len({tuple(row) for row in got.tokens.tolist()}) == 6
    np.testing.assert_array_equal(run(model, samples=2).tokens, run(model).tokens.repeat(2, axis=0))


@pytest.mark.parametrize("window, count", [(5, 1), (6, 2), (5, 3), (4, 5), (1, 3)])
def test_several_tokens_at_a_time_at_every_place_of_the_ring(window, count):
    """Equal to the whole text at once, where some are taken back and come again, as many as each row likes.

    A row of padding only comes along, and sees nothing.
    """
    rows, length, prompt = 8, 60, 4
    # Weights of half the size: they make rounding larger, not mistakes.
    changes = dict(layer_types=(SLIDING, FULL), num_hidden_layers=3, initializer_range=0.15)
    graph, parameters = split(sliding_window=window, **changes)
    random = np.random.default_rng(0)
    texts = random.integers(1, 97, (rows, length))
    padding = np.arange(rows) % prompt  # of each row
    mask = np.arange(length) >= padding[:, None]
    whole = text_batch(texts, mask)
    expected = np.asarray(hidden_states(graph, parameters, whole))
    module = nnx.merge(graph, parameters)
    before = jax.tree.map(lambda x: x[:, :prompt], whole)
    _, cache = module.prefill(
        module.embed(before), before.positions, module.mask(before), whole.segment_ids, at_a_time=count
    )
    assert [layer.slots for layer in cache.layers] == [window + count - 1, length, window + count - 1]

    at, seen = np.full(rows, prompt), set()
    while (at + count <= length).all():
        columns = at[:, None] + np.arange(count)
        kept = random.integers(0 if count > 1 else 1, count + 1, rows)
        tokens = np.take_along_axis(texts, columns, axis=1)
        wrong = np.arange(count) >= kept[:, None]
        positions = np.take_along_axis(whole.positions, columns, axis=1)
        cache = KVCache(cache.layers, cache.segment_ids, jnp.asarray(at, jnp.int32))
        got, cache = further(graph, parameters, cache, np.where(wrong, 96 - tokens, tokens), positions)
        right = np.take_along_axis(expected, columns[:, :, None], axis=1)
        np.testing.assert_allclose(np.where(wrong[:, :, None], right, got), right, atol=1e-5)
        seen |= set((at % (window + count - 1)).tolist())
        at = at + kept
    assert seen == set(range(window + count - 1)) and at.max() > 30


@pytest.mark.parametrize("window, count", [(5, 1), (6, 2), (5, 3), (4, 5)])
def test_several_tokens_at_a_time_where_rows_are_equally_long(window, count):
    """As above with one length for all rows, which is how a cache begins."""
    graph, parameters = split(sliding_window=window, layer_types=(SLIDING, FULL), num_hidden_layers=3)
    whole = text_batch(np.random.default_rng(0).integers(1, 97, (2, 3 + 10 * count)))
    module, before = nnx.merge(graph, parameters), jax.tree.map(lambda x: x[:, :3], whole)
    _, cache = module.prefill(
        module.embed(before), before.positions, module.mask(before), whole.segment_ids, at_a_time=count
    )
    found = []

    for start in range(3, whole.tokens.shape[1], count):
        part = slice(start, start + count)
        got, cache = further(graph, parameters, cache, whole.tokens[:, part], whole.positions[:, part])
        found.append(got)
    np.testing.assert_allclose(np.concatenate(found, axis=1), hidden_states(graph, parameters, whole)[:, 3:], atol=1e-5)
    places = {(3 + count * turn) % (window + count - 1) for turn in range(10)}
    assert places == set(range(window + count - 1))
