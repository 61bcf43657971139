"""Routers and their loss against Transformers: who goes where, the auxiliary loss, and its gradients."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import quick_and_slow
from flax import nnx
from parity import assert_gradients, decoder, saved, torch

from vishwamai import VishwamAI
from vishwamai.data.batch import text_batch
from vishwamai.models.config import BalanceScope
from vishwamai.training.losses import next_token_loss
from vishwamai.training.routing import all_layers, balance_loss, router_losses

KINDS = {
    "mixtral": dict(family="mixtral", tie_word_embeddings=False),
    "qwen3_moe": dict(family="qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0], norm_topk_prob=True),
}


@pytest.fixture(scope="module", params=quick_and_slow(KINDS, ["qwen3_moe"]))
def pair(request, tmp_path_factory):
    theirs = decoder(**request.param)
    return theirs, VishwamAI.from_pretrained(saved(theirs, tmp_path_factory.mktemp("mixture")))


def case():
    ids = np.random.default_rng(0).integers(0, 199, (3, 31))
    mask = np.ones_like(ids)
    mask[0, :9] = mask[1, 20:] = 0
    return ids, mask


def test_the_config_is_read(pair):
    theirs, ours = pair
    assert ours.config.mixture.router_aux_loss_coef == theirs.config.router_aux_loss_coef == 0.03
    assert ours.config.mixture.aux_loss_scope is BalanceScope.MODEL


def test_every_expert_gets_the_tokens_that_it_gets_there(pair):
    theirs, ours = pair
    ids, mask = case()
    with torch.no_grad():
        out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), output_router_logits=True)
    found = all_layers(nnx.merge(ours.graph, ours.parameters).decoded(text_batch(ids, mask)).routing)
    live, k = mask.reshape(-1) == 1, ours.config.mixture.num_experts_per_tok
    assert len(found.load) == len(out.router_logits)
    for layer, logits in enumerate(out.router_logits):
        choices = torch.topk(logits, k, dim=-1).indices.numpy()[live]
        np.testing.assert_array_equal(found.load[layer], np.bincount(choices.reshape(-1), minlength=6))
        assert len(set(np.asarray(found.load[layer]).tolist())) > 2, "uneven, so that a mix-up shows"
    np.testing.assert_array_equal(found.tokens, live.sum())


def test_the_auxiliary_loss_and_every_gradient(pair):
    theirs, ours = pair
    ids, mask = case()
    mask[0] = 1  # padding behind only: Transformers also learns the first token behind padding
    labels = torch.tensor(np.where(mask == 1, ids, -100))
    theirs.zero_grad()
    out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), labels=labels, output_router_logits=True)
    out.loss.backward()
    batch = dataclasses.replace(text_batch(ids, mask), loss_weights=mask.astype(np.float32))

    def total(parameters):
        model = nnx.merge(ours.graph, parameters)
        decoded = model.decoded(batch)
        added, _ = router_losses(decoded.routing, ours.config.mixture)
        loss = next_token_loss(model, decoded.hidden, batch, chunk=16)[0]
        return loss / mask[:, 1:].sum() + added, balance_loss(decoded.routing, BalanceScope.MODEL)

    (value, balance), gradients = jax.value_and_grad(total, has_aux=True)(ours.parameters)
    assert abs(float(balance) - out.aux_loss.item()) <= 1e-5
    assert balance > ours.config.mixture.num_experts_per_tok, "uneven"
    assert abs(float(value) - out.loss.item()) <= 1e-5
    assert_gradients(gradients, theirs, ours.family.layout.rows(ours.config))


def test_scopes_are_equal_where_layers_are_alike(pair):
    _, ours = pair
    ids, mask = case()
    routing = nnx.merge(ours.graph, ours.parameters).decoded(text_batch(ids, mask)).routing
    one = {name: jax.tree.map(lambda x: x[:1], stack) for name, stack in list(routing.items())[:1]}
    by_scope = [balance_loss(one, scope) for scope in BalanceScope]
    np.testing.assert_allclose(*by_scope, rtol=1e-6)
    assert balance_loss(routing, BalanceScope.LAYER) > balance_loss(routing, BalanceScope.MODEL)
