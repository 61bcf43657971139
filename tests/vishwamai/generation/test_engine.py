"""Cached decoding against the whole forward pass for every token, and against Transformers' `generate`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vishwamai.data.batch import text_batch
from vishwamai.generation import Sampling, decoding, engine, generate, left_padded
from vishwamai.generation.prompts import bucket, extended_left
from vishwamai.models.config import TextConfig
from vishwamai.models.transformer import Transformer

CONFIG = TextConfig(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,  # large, so that the most likely token changes with what was said
)
PROMPTS = [[5, 9, 11, 2, 40, 41, 42, 7, 7, 3, 12], [3], [8, 1, 60, 61, 62]]
FREE = dict(end_ids=[], pad_id=0)


def split(**changes):
    model = Transformer(CONFIG.model_copy(update=changes), rngs=nnx.Rngs(1))
    model.embed_tokens.embedding[...] *= 0.1  # or a tied output repeats what came in
    return nnx.split(model)


@pytest.fixture(
    scope="module",
    params=[dict(), dict(tie_word_embeddings=False, num_key_value_heads=6)],
    ids=["tied 3:1", "untied 1:1"],
)
def model(request):
    return split(**request.param)


@pytest.fixture(scope="module")
def small():
    return split()


def uncached(model, prompt, count):
    """Greedy tokens, the whole text run anew for each."""
    module = nnx.merge(*model)
    run = jax.jit(lambda parameters, batch: nnx.merge(model[0], parameters).hidden_states(batch))
    text = list(prompt)
    for _ in range(count):
        padded = text_batch([text + [0] * (64 - len(text))], [[1] * len(text) + [0] * (64 - len(text))])
        text.append(int(jnp.argmax(module.unembed(run(model[1], padded)[0, len(text) - 1]))))
    return text[len(prompt) :]


def test_greedy_tokens_equal_those_without_a_cache(model):
    got = generate(*model, left_padded(PROMPTS, 0), max_new_tokens=20, **FREE)
    assert got.dtype == np.int32 and got.shape == (3, 20)
    for row, prompt in zip(got.tolist(), PROMPTS, strict=True):
        assert row == uncached(model, prompt, 20)
        assert len(set(row)) > 5  # no loop of one token, in which a broken cache could hide


@pytest.mark.parametrize("length, count", [(8, 8), (9, 9)])
def test_prompts_and_answers_that_fill_their_shapes(small, length, count):
    """Exactly a bucket's size, and one token more: no slot is too few or too many."""
    prompt = np.random.default_rng(length).integers(1, 97, length).tolist()
    got = generate(*small, left_padded([prompt], 0), max_new_tokens=count, **FREE)
    assert got.tolist() == [uncached(small, prompt, count)]


def test_a_batch_of_one_equals_its_row_of_a_batch(small):
    together = generate(*small, left_padded(PROMPTS, 0), max_new_tokens=9, **FREE)
    for row, prompt in zip(together, PROMPTS, strict=True):
        np.testing.assert_array_equal(generate(*small, left_padded([prompt], 0), max_new_tokens=9, **FREE)[0], row)


@pytest.mark.slow
def test_a_drawn_row_depends_on_its_number_and_not_on_its_neighbours(small):
    sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=7)
    options = dict(max_new_tokens=9, sampling=sampling, **FREE)
    together = generate(*small, left_padded(PROMPTS, 0), **options)
    np.testing.assert_array_equal(generate(*small, left_padded(PROMPTS[:1], 0), **options), together[:1])
    others = generate(*small, left_padded([[1] * 11, [2, 3, 4], PROMPTS[2]], 0), **options)
    np.testing.assert_array_equal(others[2], together[2])
    assert (generate(*small, left_padded(PROMPTS[2:], 0), **options) != together[2]).any()


def test_what_pads_does_not_matter(small):
    batch = left_padded(PROMPTS, 0)
    other = left_padded(PROMPTS, 55)
    np.testing.assert_array_equal(*(generate(*small, b, max_new_tokens=9, **FREE) for b in (batch, other)))


def test_rows_end_and_are_filled(small):
    free = generate(*small, left_padded(PROMPTS, 0), max_new_tokens=12, **FREE)
    end = [int(free[0, 4]), int(free[2, 6])]
    got = generate(*small, left_padded(PROMPTS, 0), max_new_tokens=12, end_ids=end, pad_id=96)
    for row, whole in zip(got.tolist(), free.tolist(), strict=True):
        last = next((i for i, token in enumerate(whole) if token in end), 11)
        assert row == whole[: last + 1] + [96] * (11 - last)
    assert 96 in got


def test_answers_have_neither_their_end_nor_what_pads(small):
    free = generate(*small, left_padded(PROMPTS, 0), max_new_tokens=12, **FREE)
    end, pad = int(free[0, 4]), int(free[1, 2])  # what pads is a word, too
    generation = engine.Generation(*small, left_padded(PROMPTS, 0), max_new_tokens=12, end_ids=[end], pad_id=pad)
    generation.advance(12)
    for answer, whole in zip(generation.answers, free.tolist(), strict=True):
        assert answer.tolist() == whole[: whole.index(end)] if end in whole else answer.tolist() == whole
    generation.cut({1: 2})
    assert generation.answers[1].tolist() == free[1, :2].tolist()
    assert (generation.tokens[1, 2:] == pad).all()


def test_the_first_token_can_be_the_end(small):
    first = generate(*small, left_padded([PROMPTS[0]], 0), max_new_tokens=1, **FREE)[0, 0]
    got = generate(*small, left_padded([PROMPTS[0]], 0), max_new_tokens=5, end_ids=[first], pad_id=96)
    assert got.tolist() == [[first, 96, 96, 96, 96]]


def started(model, ending, prompts=PROMPTS, room=16):
    batch = extended_left(left_padded(prompts, 0), 16)
    settings = Sampling().settings(batch.rows, CONFIG.vocab_size)
    ending = decoding.Ending(jnp.asarray(ending, jnp.int32), jnp.int32(0))
    models = decoding.Models(decoding.Model(model[1], model[0], jnp.float32), None)
    layers, state = decoding.start(models, batch, settings, ending, sizes=decoding.Sizes(room, 1, 0, False))
    return lambda state, limit: decoding.proceed(
        models, layers, state, jnp.int32(limit), settings, ending, draft_tokens=0
    ), state


def test_the_loop_stops_when_every_row_has_ended(small):
    free = generate(*small, left_padded(PROMPTS[:1], 0), max_new_tokens=16, **FREE)
    further, state = started(small, [int(free[0, 5])], PROMPTS[:1])
    first = free[0].tolist().index(free[0, 5])
    assert int(further(state, 16).cache.length) == 16 + first


def test_the_loop_can_stop_and_go_on(small):
    further, state = started(small, [])
    state = further(further(state, 5), 11)
    assert state.length.tolist() == [11] * 3 and int(state.cache.length) == 16 + 10
    np.testing.assert_array_equal(
        state.tokens[:, :11], generate(*small, left_padded(PROMPTS, 0), max_new_tokens=11, **FREE)
    )


def test_shapes_of_one_bucket_compile_once(small):
    generate(*small, left_padded([[1] * 33], 0), max_new_tokens=33, **FREE)
    before = decoding.start._cache_size(), decoding.proceed._cache_size()
    for length, count, temperature in [(34, 40, 0.0), (40, 35, 0.7)]:
        sampling = Sampling(temperature, top_k=3, top_p=0.9, seed=4)
        generate(*small, left_padded([[1] * length], 0), max_new_tokens=count, sampling=sampling, **FREE)
    assert (decoding.start._cache_size(), decoding.proceed._cache_size()) == before
    generate(*small, left_padded([[1] * 41], 0), max_new_tokens=33, **FREE)
    assert decoding.start._cache_size() == before[0] + 1


def test_buckets_are_few_and_near():
    buckets = {bucket(length) for length in range(1, 4097)}
    assert len(buckets) <= 35 and all(bucket(size) == size for size in buckets)
    assert all(length <= bucket(length) <= max(length + 7, 1.25 * length) for length in range(1, 4097))


def test_bfloat16_runs(small):
    got = generate(*small, left_padded(PROMPTS, 0), max_new_tokens=3, dtype=jnp.bfloat16, **FREE)
    assert got.shape == (3, 3)


@pytest.mark.parametrize(
    "batch, count, message",
    [
        (left_padded([[1] * 100], 0), 29, r"100 tokens and max_new_tokens is 29, the context holds 128.*to 28"),
        (left_padded([[1] * 4], 0), 0, r"max_new_tokens=0: expected at least 1"),
        (text_batch([[1, 2, 3], [1, 2, 0]], [[1, 1, 1], [1, 1, 0]]), 4, r"row 1 is empty or padded on the right"),
    ],
)
def test_what_can_not_be_continued(small, batch, count, message):
    with pytest.raises(ValueError, match=message):
        generate(*small, batch, max_new_tokens=count, **FREE)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        left_padded([[3], []], 0)


def test_the_context_can_be_filled_to_the_last_token(small):
    assert generate(*small, left_padded([[1] * 100], 0), max_new_tokens=28, **FREE).shape == (1, 28)


def test_segments_before_the_last_are_not_seen(small):
    """A packed row continues its last example."""
    alone = generate(*small, left_padded([PROMPTS[2]], 0), max_new_tokens=6, **FREE)
    batch = left_padded([PROMPTS[0] + PROMPTS[2]], 0)
    segment_ids, positions = batch.segment_ids.copy(), batch.positions.copy()
    segment_ids[:, 11:], positions[:, 11:] = 2, np.arange(5)
    batch = dataclasses.replace(batch, segment_ids=segment_ids, positions=positions)
    np.testing.assert_array_equal(generate(*small, batch, max_new_tokens=6, **FREE), alone)
