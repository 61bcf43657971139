"""Draws against exact probabilities; which tokens top_k and top_p leave, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai.generation.sampling import Sampling, likely, sample

V = 50
LOGITS = np.random.default_rng(0).normal(0, 2, (1, V)).astype(np.float32)
DRAW = jax.jit(sample)
LIKELY = jax.jit(likely)


def draws(count, **options):
    """`count` rows of the same logits."""
    return np.asarray(
        DRAW(np.repeat(LOGITS, count, 0), Sampling(**options).settings(count, V), jnp.zeros(count, jnp.int32))
    )


def softmax(x):
    weights = np.exp(x.astype(np.float64) - x.max())
    return weights / weights.sum()


def assert_drawn_from(tokens, probabilities):
    """Pearson's statistic within five deviations of its mean (tokens expected less than 5 times are lumped)."""
    counts, expected = np.bincount(tokens, minlength=V).astype(float), probabilities * len(tokens)
    assert not counts[probabilities == 0].any()
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum() + 1e-9)
    statistic, degrees = np.sum((counts - expected) ** 2 / np.maximum(expected, 1)), len(counts) - 1
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temperature):
    assert_drawn_from(draws(20_000, temperature=temperature), softmax(LOGITS[0] / temperature))


def test_draws_follow_what_top_k_and_top_p_leave():
    scaled = LOGITS[0] / 1.5
    order = np.argsort(-scaled)
    kept = order[:12]
    shares = softmax(scaled[kept])
    kept = kept[: np.searchsorted(np.cumsum(shares), 0.8) + 1]
    probabilities = np.zeros(V)
    probabilities[kept] = softmax(scaled[kept])
    assert 2 < len(kept) < 12
    assert_drawn_from(draws(20_000, temperature=1.5, top_k=12, top_p=0.8), probabilities)


def sorted_reference(logits, top_k, top_p):
    """The definition, in float64: the k largest, then as few of them as add up to top_p."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-weights, kind="stable")[:top_k]
    shares = weights[order] / weights[order].sum()
    before = np.cumsum(shares) - shares
    kept = np.zeros(len(logits), bool)
    kept[order[before < top_p]] = True
    return kept


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.1, 1, 5, 40]),
    top_k=st.integers(1, V),
    top_p=st.floats(0.01, 0.99),
)
def test_what_is_left_equals_sorting(seed, scale, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, scale, (1, V)).astype(np.float32)
    kept = np.asarray(LIKELY(logits, jnp.int32(top_k), jnp.float32(top_p), jnp.float32(0)))[0]
    assert kept[np.argmax(logits)]
    near = [sorted_reference(logits[0], top_k, top_p + error) for error in (-1e-5, 0, 1e-5)]  # sums in float32
    underflow = np.exp(logits[0] - logits.max()) == 0
    assert any((kept == reference)[~underflow].all() for reference in near)


def test_edges():
    every = np.asarray(LIKELY(LOGITS, jnp.int32(V), jnp.float32(1.0), jnp.float32(0)))
    assert every.all()
    assert LIKELY(LOGITS, jnp.int32(V), jnp.float32(1e-9), jnp.float32(0)).sum() == 1
    flat = np.zeros((1, V), np.float32)
    assert np.asarray(
        LIKELY(flat, jnp.int32(3), jnp.float32(1.0), jnp.float32(0))
    ).all()  # equally likely tokens are not told apart
    certain = np.where(np.arange(V) == 7, 0, -np.inf)[None].astype(np.float32)
    assert (np.flatnonzero(LIKELY(certain, jnp.int32(V), jnp.float32(0.9), jnp.float32(0))) == [7]).all()


def test_edges_of_min_p():
    flat, ties = np.zeros((1, V), np.float32), np.where(np.arange(V) < 3, 4, LOGITS - 10).astype(np.float32)
    assert np.asarray(LIKELY(flat, jnp.int32(V), jnp.float32(1.0), jnp.float32(1.0))).all()
    kept = LIKELY(ties, jnp.int32(V), jnp.float32(1.0), jnp.float32(1.0))[0]
    assert np.flatnonzero(kept).tolist() == [0, 1, 2]
    shares = softmax(LOGITS[0])
    second = float(np.float32(np.sort(shares)[-2] / shares.max()))
    for min_p, count in [(second * 1.001, 1), (second * 0.999, 2)]:
        assert LIKELY(LOGITS, jnp.int32(V), jnp.float32(1.0), jnp.float32(min_p)).sum() == count


def test_draws_follow_what_min_p_leaves():
    shares = softmax(LOGITS[0] / 1.5)
    kept = shares >= 0.2 * shares.max()
    assert 2 < kept.sum() < 20
    assert_drawn_from(draws(20_000, temperature=1.5, min_p=0.2), np.where(kept, shares, 0) / shares[kept].sum())
    assert (draws(50, temperature=5.0, min_p=1.0) == LOGITS[0].argmax()).all()


def test_a_penalty_makes_what_was_said_less_likely():
    held = np.arange(V) % 2 == 0
    settings = Sampling(repetition_penalty=1.7).settings(1, V)

    def penalised(logits):
        return np.where(held, np.where(logits < 0, logits * 1.7, logits / 1.7), logits)

    for logits in (LOGITS, LOGITS - 20):  # of either sign at the top
        assert DRAW(logits, settings, jnp.zeros(1, jnp.int32), held[None]) == penalised(logits).argmax()
    drawn = Sampling(temperature=1.0, repetition_penalty=1.7).settings(20_000, V)
    tokens = DRAW(np.repeat(LOGITS, 20_000, 0), drawn, jnp.zeros(20_000, jnp.int32), np.repeat(held[None], 20_000, 0))
    assert_drawn_from(np.asarray(tokens), softmax(penalised(LOGITS)[0]))


def test_draws_follow_what_is_left_by_all_of_them():
    """A penalty, then the temperature, then top_k, top_p of what that leaves, min_p."""
    held = np.arange(V) % 3 == 0
    options = dict(temperature=1.5, top_k=14, top_p=0.9, min_p=0.3, repetition_penalty=1.6)
    scaled = np.where(held, np.where(LOGITS < 0, LOGITS * 1.6, LOGITS / 1.6), LOGITS)[0].astype(np.float64) / 1.5
    order = np.argsort(-scaled)
    shares = softmax(scaled[order[:14]])
    left = order[: np.searchsorted(np.cumsum(shares), 0.9) + 1]
    kept = left[scaled[left] >= scaled.max() + np.log(0.3)]
    assert 2 < len(kept) < len(left) < 14 and held[kept].any()
    probabilities = np.zeros(V)
    probabilities[kept] = softmax(scaled[kept])
    many = 20_000
    drawn = DRAW(
        np.repeat(LOGITS, many, 0),
        Sampling(**options).settings(many, V),
        jnp.zeros(many, jnp.int32),
        np.repeat(held[None], many, 0),
    )
    assert_drawn_from(np.asarray(drawn), probabilities)


def test_temperature_0_top_k_1_and_a_tiny_top_p_are_the_most_likely_token():
    best = LOGITS[0].argmax()
    for options in (dict(), dict(temperature=5.0, top_k=1), dict(temperature=5.0, top_p=1e-6), dict(temperature=1e-38)):
        assert (draws(50, **options) == best).all()


def test_seeds_reproduce_and_differ():
    first, again, other = (draws(64, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(set(first.tolist())) > 5  # rows differ


def test_steps_differ_and_rows_do_not_depend_on_their_neighbours():
    logits = np.random.default_rng(5).normal(0, 1, (4, V)).astype(np.float32)
    scheme = Sampling(temperature=1.0, seed=9)
    rows = [np.asarray(DRAW(logits, scheme.settings(4, V), jnp.full(4, step))) for step in range(20)]
    alone = [np.asarray(DRAW(logits[:1], scheme.settings(1, V), jnp.full(1, step))) for step in range(20)]
    np.testing.assert_array_equal(np.stack(rows)[:, 0], np.stack(alone)[:, 0])
    assert len({tuple(row) for row in map(tuple, rows)}) > 10


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=0), "top_k=0: expected at least 1"),
        (dict(top_p=0.0), "top_p=0.0: expected a share"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(min_p=-0.1), "min_p=-0.1: expected a share"),
        (dict(min_p=1.01), "min_p=1.01: expected a share"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
