"""The loss against a float64 reference written as loops over examples, forward and backward."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import array_sizes
from numpy.testing import assert_allclose

from vishwamai.training.losses import loss_weights, next_token_loss


class Unembed:
    """A model that is nothing but its output matrix."""

    def __init__(self, table):
        self.table = table

    def unembed(self, x):
        return jnp.einsum("...d,vd->...v", x, self.table, preferred_element_type=jnp.float32)


def reference(hidden, table, batch, z_loss):
    """Loss sum, hits, and gradients by hidden states and table, in float64, one prediction after the other."""
    hidden, table = np.float64(hidden), np.float64(table)
    loss = penalty = hits = 0.0
    by_hidden, by_table = np.zeros_like(hidden), np.zeros_like(table)
    rows, length = batch.tokens.shape
    for b in range(rows):
        for t in range(length - 1):
            if batch.segment_ids[b, t] == 0 or batch.segment_ids[b, t] != batch.segment_ids[b, t + 1]:
                continue
            weight, target = float(batch.loss_weights[b, t + 1]), batch.tokens[b, t + 1]
            logits = table @ hidden[b, t]
            log_z = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            probabilities = np.exp(logits - log_z)
            loss += weight * (log_z - logits[target])
            penalty += weight * z_loss * log_z**2
            hits += weight * (logits.argmax() == target)
            by_logits = weight * (1 + 2 * z_loss * log_z) * probabilities
            by_logits[target] -= weight
            by_hidden[b, t] += table.T @ by_logits
            by_table += np.outer(by_logits, hidden[b, t])
    return loss, penalty, hits, by_hidden, by_table


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 5, 21, 512])
def test_equals_the_reference_for_any_chunk(source, chunk, z_loss):
    batch = source.batch(0)
    draw = np.random.default_rng(1)
    hidden = draw.normal(size=(*batch.tokens.shape, 6)).astype(np.float32)
    table = draw.normal(size=(64, 6)).astype(np.float32)

    def twice_the_loss(hidden, table):
        total, sums = next_token_loss(Unembed(table), hidden, batch, z_loss=z_loss, chunk=chunk)
        return 2 * total, sums

    (total, sums), grads = jax.value_and_grad(twice_the_loss, argnums=(0, 1), has_aux=True)(hidden, table)
    cross_entropy, penalty, hits, by_hidden, by_table = reference(hidden, table, batch, z_loss)
    assert_allclose(sums["loss"], cross_entropy, rtol=1e-6)
    assert_allclose(sums["z_loss"], penalty, rtol=1e-6)
    assert_allclose(total, 2 * (cross_entropy + penalty), rtol=1e-6)
    assert_allclose(sums["hits"], hits)
    assert_allclose(grads[0], 2 * by_hidden, atol=1e-5)
    assert_allclose(grads[1], 2 * by_table, atol=1e-4)


def test_extreme_logits_stay_finite(source):
    batch = source.batch(0)
    hidden = np.full((*batch.tokens.shape, 2), 1e4, np.float32)
    table = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    gradient = jax.grad(lambda h: next_token_loss(Unembed(table), h, batch)[0])(hidden)
    assert np.isfinite(gradient).all()


def test_weights_shift_and_stop_at_the_end_of_an_example(source):
    batch = source.batch(0)
    batch = replace(
        batch,
        segment_ids=np.array([[1, 1, 1, 2, 2, 0]]),
        loss_weights=np.array([[9, 0.5, 1, 9, 2, 9]], np.float32),
    )
    assert_allclose(loss_weights(batch), [[0.5, 1, 0, 2, 0, 0]])


def test_chunks_without_weight_are_passed_over(source):
    """Nothing is computed there: what stands in them, even NaN, reaches nothing."""
    batch = source.batch(0)
    rows, length = batch.tokens.shape
    chunk, draw = length // 3, np.random.default_rng(2)
    weights = np.ones((rows, length), np.float32)
    weights[:, : 2 * chunk + 1] = 0  # a prediction has the weight of the token behind it
    batch = replace(batch, segment_ids=np.ones_like(batch.segment_ids), loss_weights=weights)
    hidden, table = draw.normal(size=(rows, length, 6)).astype(np.float32), draw.normal(size=(64, 6)).astype(np.float32)
    loss = lambda h, w: next_token_loss(Unembed(w), h, batch, chunk=chunk)[0]  # noqa: E731
    expected = jax.grad(loss, argnums=(0, 1))(hidden, table)
    hidden[:, : 2 * chunk] = np.nan
    for found, gradient in zip(jax.grad(loss, argnums=(0, 1))(hidden, table), expected, strict=True):
        assert_allclose(found, gradient, atol=1e-6)
    assert not np.any(expected[0][:, : 2 * chunk])


def test_logits_of_the_whole_batch_never_exist(source):
    """No array in the forward or backward pass is as large as rows x length x vocabulary."""
    batch = source.batch(0)
    hidden, table = jnp.zeros((*batch.tokens.shape, 6)), jnp.zeros((64, 6))
    loss = lambda h, w, chunk: next_token_loss(Unembed(w), h, batch, chunk=chunk)[0]  # noqa: E731
    whole = batch.tokens.size * 64

    def largest(function, *arguments):
        return max(array_sizes(jax.make_jaxpr(function)(*arguments).jaxpr))

    def largest_of(chunk):
        return largest(jax.grad(partial(loss, chunk=chunk), argnums=(0, 1)), hidden, table)

    assert largest(Unembed(table).unembed, hidden) == whole  # it would be seen
    assert largest_of(chunk=3) == 8 * 3 * 64
    assert largest_of(chunk=8) == 8 * 7 * 64  # three equal chunks pad nothing
    assert largest_of(chunk=21) == largest_of(chunk=512) == 8 * 11 * 64  # halves, however short the rows


def test_logits_are_made_once_and_a_frozen_table_has_no_gradient(source):
    batch = source.batch(0)
    hidden, table = jnp.zeros((*batch.tokens.shape, 6)), jnp.zeros((64, 6))

    def products(**options):
        gradient = jax.grad(lambda h, w: next_token_loss(Unembed(w), h, batch)[0], **options)
        return str(jax.make_jaxpr(gradient)(hidden, table)).count("dot_general[")

    assert products(argnums=(0, 1)) == 3  # logits, and by each of the two
    assert products(argnums=0) == 2
