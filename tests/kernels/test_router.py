"""Routers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import route

LOGITS = np.random.default_rng(0).normal(0, 2, (37, 7))


def by_hand(logits, k, scoring, renormalise, bias=0.0, scale=1.0):
    logits = np.asarray(logits, np.float64)
    if scoring == "softmax":
        found = np.exp(logits - logits.max(axis=1, keepdims=True))
        found /= found.sum(axis=1, keepdims=True)
    else:
        found = 1 / (1 + np.exp(-logits))
    experts = np.argsort(-(found + bias), axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(found, experts, axis=1)
    return experts, scale * (weights / weights.sum(axis=1, keepdims=True) if renormalise else weights)


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


def test_gradients_flow_through_the_weights():
    direction = jnp.asarray(np.random.default_rng(2).normal(size=(37, 3)))

    def weighed(logits):
        return jnp.sum(route(logits, 3).weights * direction)

    gradient = jax.grad(weighed)(jnp.asarray(LOGITS, jnp.float32))
    experts = route(jnp.asarray(LOGITS), 3).experts
    chosen = np.zeros_like(LOGITS, bool)
    np.put_along_axis(chosen, np.asarray(experts), True, axis=1)
    assert np.abs(np.asarray(gradient)[~chosen]).max() < 1e-6, "with weights that sum to 1, only the chosen ones matter"
    step = 1e-3 * np.asarray(gradient)
    expected = 1e-3 * np.sum(np.square(gradient))
    assert weighed(jnp.asarray(LOGITS + step)) - weighed(jnp.asarray(LOGITS)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("size", [-1e4, 1e4])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_extreme_logits_stay_finite(scoring, size):
    found = route(jnp.full((3, 4), size), 2, scoring=scoring)
    assert np.isfinite(found.weights).all() and found.weights.dtype == jnp.float32
    gradient = jax.grad(lambda x: route(x, 2, scoring=scoring).weights[:, 0].sum())(jnp.full((3, 4), size))
    assert np.isfinite(gradient).all()


def test_bad_arguments_are_named():
    logits = jnp.zeros((3, 4))
    for call, message in [
        (lambda: route(logits, 5), r"top_k=5 of logits \(3, 4\)"),
        (lambda: route(logits, 0), "top_k=0"),
        (lambda: route(logits, 2, scoring="tanh"), "scoring='tanh': expected one of softmax, sigmoid"),
        (lambda: route(logits, 2, bias=jnp.zeros(3)), r"bias has shape \(3,\), the logits \(3, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
