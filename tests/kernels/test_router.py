"""Routers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import route

LOGITS = np.random.default_rng(0).normal(0, 2, (37, 7))


def scores_by_hand(logits, scoring):
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    return found / found.sum(axis=1, keepdims=True)


def by_hand(logits, k, scoring, renormalise, bias=0.0, scale=1.0):
    found = scores_by_hand(np.asarray(logits, np.float64), scoring)
    experts = np.argsort(-(found + bias), axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(found, experts, axis=1)
    return experts, scale * (weights / weights.sum(axis=1, keepdims=True) if renormalise else weights)


def sums_by_hand(logits, scoring, live):
    """Of a batch: probability, z, entropy."""
    share = scores_by_hand(logits, scoring)
    share = share / share.sum(axis=1, keepdims=True)
    z = np.log(np.exp(logits).sum(axis=1)) ** 2
    return share[live].sum(axis=0), z[live].sum(), -(share * np.log(share)).sum(axis=1)[live].sum()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_against_numpy(scoring, renormalise, k):
    bias = np.random.default_rng(1).normal(0, 0.3, 7) if scoring == "sigmoid" else None
    options = dict(scoring=scoring, renormalise=renormalise, scale=1.5)
    found = route(jnp.asarray(LOGITS), k, bias=None if bias is None else jnp.asarray(bias), **options)
    experts, weights = by_hand(LOGITS, k, bias=0.0 if bias is None else bias, **options)
    np.testing.assert_array_equal(found.experts, experts)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-5)
    np.testing.assert_array_equal(found.counts, np.bincount(experts.reshape(-1), minlength=7))


def test_the_bias_chooses_and_weighs_nothing():
    bias = jnp.zeros(7).at[4].set(10.0)
    found = route(jnp.asarray(LOGITS), 2, scoring="sigmoid", renormalise=False, bias=bias)
    assert np.all(found.experts[:, 0] == 4)
    np.testing.assert_allclose(found.weights[:, 0], 1 / (1 + np.exp(-LOGITS[:, 4])), rtol=1e-5)
    gradient = jax.grad(lambda b: route(jnp.asarray(LOGITS), 2, scoring="sigmoid", bias=b).weights.sum())(bias)
    assert not np.any(gradient)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_sums_over_live_tokens(scoring):
    live = np.random.default_rng(1).random(37) < 0.7
    poisoned = jnp.where(live[:, None], jnp.asarray(LOGITS), jnp.nan)
    found = route(poisoned, 3, scoring=scoring, live=jnp.asarray(live))
    everywhere = route(jnp.asarray(LOGITS), 3, scoring=scoring)
    np.testing.assert_array_equal(found.experts, np.where(live[:, None], everywhere.experts, 7))
    np.testing.assert_array_equal(found.weights[live], everywhere.weights[live])
    np.testing.assert_array_equal(
        found.counts, np.bincount(np.asarray(everywhere.experts)[live].reshape(-1), minlength=7)
    )
    for routes, kept in ((found, live), (everywhere, np.full(37, True))):
        for ours, true in zip(routes[3:], sums_by_hand(LOGITS, scoring, kept), strict=True):
            np.testing.assert_allclose(ours, true, rtol=1e-5)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradients_against_float64(scoring, renormalise):
    """Of weights and sums together, by central differences; padding has none, whatever stands in it."""
    draw, live = np.random.default_rng(2), np.arange(37) % 5 > 0
    direction, share = draw.normal(size=(37, 3)) * live[:, None], draw.normal(size=7)
    chosen = by_hand(LOGITS, 3, scoring, renormalise)[0]

    def true(logits):
        weights = np.take_along_axis(scores_by_hand(logits, scoring), chosen, axis=1)
        weights = weights / weights.sum(axis=1, keepdims=True) if renormalise else weights
        probability, z, entropy = sums_by_hand(logits, scoring, live)
        return np.sum(weights * direction) + probability @ share + 0.1 * z + 0.3 * entropy

    def ours(logits):
        routes = route(logits, 3, scoring=scoring, renormalise=renormalise, live=jnp.asarray(live))
        weighed = jnp.sum(jnp.where(live[:, None], routes.weights * direction, 0))
        return weighed + routes.probability @ jnp.asarray(share) + 0.1 * routes.z + 0.3 * routes.entropy

    poisoned = np.where(live[:, None], LOGITS, np.nan)
    found, expected = jax.grad(ours)(jnp.asarray(poisoned, jnp.float32)), np.zeros_like(LOGITS)
    for at in np.ndindex(LOGITS.shape):
        step = np.zeros_like(LOGITS)
        step[at] = 1e-5
        expected[at] = (true(LOGITS + step) - true(LOGITS - step)) / 2e-5
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.any(found[~live])


@pytest.mark.parametrize("top_groups", [1, 2, 4])
def test_only_experts_of_the_best_groups(top_groups):
    """DeepSeek-V3's: 4 groups of 3, ranked by their two best biased scores."""
    draw = np.random.default_rng(3)
    logits, bias = draw.normal(0, 2, (50, 12)), draw.normal(0, 0.3, 12)
    found = route(
        jnp.asarray(logits), 3, scoring="sigmoid", bias=jnp.asarray(bias), scale=2.5, groups=4, top_groups=top_groups
    )
    scores = scores_by_hand(logits, "sigmoid")
    for token, (score, ours) in enumerate(zip(scores, found.experts.tolist(), strict=True)):
        ranked = score + bias
        of_group = [np.sort(ranked[3 * g : 3 * g + 3])[-2:].sum() for g in range(4)]
        best = np.argsort(of_group)[::-1][:top_groups]
        allowed = [e for e in range(12) if e // 3 in best]
        assert ours == sorted(allowed, key=lambda e: -ranked[e])[:3]
        np.testing.assert_allclose(found.weights[token], 2.5 * score[ours] / score[ours].sum(), rtol=1e-5)


def test_equal_scores_go_to_the_first():
    assert route(jnp.zeros((2, 6)), 3).experts.tolist() == [[0, 1, 2]] * 2
    assert route(jnp.zeros((2, 6)), 3, groups=3, top_groups=2).experts.tolist() == [[0, 1, 2]] * 2


def test_renormalised_softmax_is_the_softmax_of_the_chosen_logits():
    found = route(jnp.asarray(LOGITS), 3)
    np.testing.assert_allclose(found.weights, jax.nn.softmax(jax.lax.top_k(jnp.asarray(LOGITS), 3)[0]), rtol=1e-5)


@pytest.mark.parametrize("size", [-1e4, 1e4])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_extreme_logits_stay_finite(scoring, size):
    found = route(jnp.full((3, 4), size), 2, scoring=scoring)
    assert np.isfinite(found.weights).all() and found.weights.dtype == jnp.float32
    gradient = jax.grad(lambda x: route(x, 2, scoring=scoring).weights[:, 0].sum())(jnp.full((3, 4), size))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_no_tokens_go_nowhere(groups):
    routes = route(jnp.zeros((0, 8)), 2, groups=groups)
    assert routes.weights.shape == (0, 2) and not routes.counts.any() and routes.z == 0


def test_bad_arguments_are_named():
    logits = jnp.zeros((3, 4))
    for call, message in [
        (lambda: route(logits, 5), r"top_k=5 of logits \(3, 4\)"),
        (lambda: route(logits, 0), "top_k=0"),
        (lambda: route(logits, 2, scoring="tanh"), "scoring='tanh': expected one of softmax, sigmoid"),
        (lambda: route(logits, 2, groups=3), "groups=3 of 4 experts: expected equal groups"),
        (lambda: route(logits, 2, groups=2, top_groups=3), "top_groups=3 of groups=2"),
        (lambda: route(logits, 3, groups=2, top_groups=1), "top_k=3 experts do not fit in top_groups=1 of 2 each"),
        (lambda: route(logits, 2, live=jnp.ones(4, bool)), r"live has shape \(4,\), the logits \(3, 4\)"),
        (lambda: route(logits, 2, bias=jnp.zeros(3)), r"bias has shape \(3,\), the logits \(3, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
