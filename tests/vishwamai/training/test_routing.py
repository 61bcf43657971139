"""Training mixtures of experts: what steps log, what balances the load, and what must change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from test_step import losses

from vishwamai.models.config import BalanceScope, MixtureConfig
from vishwamai.models.moe import Balance, Routing
from vishwamai.training.optimizer import path_name
from vishwamai.training.routing import balance_loss, moved_biases, router_losses

MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=(0,))
SIGMOID = MIXTURE | dict(scoring_func="sigmoid", router_bias_update_rate=0.01, router_aux_loss_coef=0.0)


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.fixture
def on_one_device(expected, trainer_for, source):
    if not expected:
        expected["metrics"] = losses(trainer_for(model={"mixture": MIXTURE}), source)
    return expected["metrics"]


def test_a_step_tells_the_load_of_every_expert(on_one_device):
    for metrics in on_one_device:
        load = np.array(metrics["expert_load"])
        assert load.shape == (2, 4) and (load > 0).all()
        assert_allclose(load.sum(axis=1), 1, rtol=1e-6)
        assert metrics["dropped"] == 0
        assert 0 < metrics["router_entropy"] <= np.log(4) + 1e-6
        assert metrics["balance_loss"] >= 2 - 1e-3 and metrics["router_z"] > 0
    assert on_one_device[-1]["loss"] < on_one_device[0]["loss"] - 0.01


SLOW_MESHES = {"data": 2}, {"fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "mesh",
    [*(pytest.param(m, marks=pytest.mark.slow) for m in SLOW_MESHES), {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_meshes_give_the_same_steps(trainer_for, source, on_one_device, mesh):
    found = losses(trainer_for(mesh=mesh, model={"mixture": MIXTURE}), source)
    for name in ("loss", "balance_loss", "grad_norm", "expert_load"):
        assert_allclose([m[name] for m in found], [m[name] for m in on_one_device], atol=1e-5, err_msg=name)


def test_no_device_sorts_the_rows_of_another(trainer_for, source):
    """8 rows of 21 tokens, two experts each, on 4 devices: a device sorts 84 choices, not 336."""
    trainer = trainer_for(mesh={"fsdp": 4}, model={"mixture": MIXTURE})
    with jax.set_mesh(trainer.mesh):
        text = trainer.step.__wrapped__.lower(trainer.abstract, source.batch(0)).compile().as_text()
    assert "[84]" in text and "s32[336]" not in text


@pytest.mark.slow
def test_accumulation_without_a_balance_loss_equals_the_big_batch(trainer_for, source):
    """The balance loss is one of each micro-batch; everything else adds up."""
    plain = MIXTURE | dict(router_aux_loss_coef=0.0, router_z_loss_coef=0.01)
    big, small = (
        losses(trainer_for(model={"mixture": plain}, training={"gradient_accumulation": parts}), source)
        for parts in (1, 4)
    )
    for name in ("loss", "grad_norm", "router_z", "expert_load", "router_entropy"):
        assert_allclose([m[name] for m in small], [m[name] for m in big], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing_but_memory(trainer_for, source, on_one_device, remat):
    found = losses(trainer_for(model={"mixture": MIXTURE}, training={"remat": remat}), source, 2)
    assert_allclose([m["loss"] for m in found], [m["loss"] for m in on_one_device[:2]], atol=1e-6)


def test_capacity_drops_are_counted(trainer_for, source):
    found = losses(trainer_for(model={"mixture": MIXTURE | dict(capacity_factor=0.5)}), source, 2)
    # 19 tokens of each row make 38 choices; 4 experts take 6 each at most.
    assert all(1 - 24 / 38 - 1e-6 <= metrics["dropped"] < 0.8 for metrics in found)


def test_biases_follow_the_load_and_nothing_else_moves_them(trainer_for, source):
    trainer = trainer_for(model={"mixture": SIGMOID})
    state = trainer.initial()
    name = "layers.1::1.mlp.e_score_correction_bias"
    bias = lambda state: np.asarray({path_name(p): v.get_value() for p, v in nnx.to_flat_state(state.frozen)}[name])  # noqa: E731
    assert bias(state).shape == (2, 4) and not bias(state).any()
    state, metrics = trainer.step(state, source.batch(0))
    load = np.divide(*metrics["expert_load"])
    assert_allclose(bias(state), 0.01 * np.sign(0.25 - load), atol=1e-7)
    assert np.abs(bias(state)).max() > 0


@pytest.mark.slow
def test_biases_even_out_the_load(trainer_for, source):
    """From biases that send every token to two experts; without a learning rate to speak of."""
    trainer = trainer_for(model={"mixture": SIGMOID}, optimizer={"learning_rate": 1e-9})
    state, uneven = trainer.initial(), []
    skew = jnp.array([0.2, 0.2, 0.0, 0.0])
    state = dataclasses.replace(state, frozen=jax.tree.map(lambda bias: bias + skew, state.frozen))
    for step in range(40):
        state, metrics = trainer.step(state, source.batch(step))
        uneven.append(np.abs(np.divide(*metrics["expert_load"]) - 0.25).max())
    assert uneven[0] == 0.25
    assert np.mean(uneven[-5:]) < 0.15


def test_an_unhealthy_step_moves_no_bias(trainer_for, source):
    trainer = trainer_for(model={"mixture": SIGMOID})
    state, bad = trainer.initial(), source.batch(0)
    before = jax.tree.map(np.array, state.frozen)
    bad.loss_weights[2, 3:6] = np.nan
    state, _ = trainer.step(state, bad)
    jax.tree.map(assert_array_equal, state.frozen, before)


def routing(load, probability, tokens):
    zero = jnp.zeros(())
    load, probability = (jnp.array(x, jnp.float32) for x in (load, probability))
    return Routing(load, probability, zero, zero, zero, jnp.float32(tokens))


def test_the_balance_loss_by_hand():
    even = {"0": routing([5, 5, 5, 5], [2.5] * 4, 10)}
    assert_allclose(balance_loss(even, BalanceScope.LAYER), 2)  # k choices per token
    all_to_two = {"0": routing([10, 10, 0, 0], [5, 5, 0, 0], 10)}
    assert_allclose(balance_loss(all_to_two, BalanceScope.LAYER), 4)
    turned = {"1": routing([0, 0, 10, 10], [0, 0, 5, 5], 10)}
    assert_allclose(balance_loss(all_to_two | turned, BalanceScope.LAYER), 4)
    assert_allclose(balance_loss(all_to_two | turned, BalanceScope.MODEL), 2)


def test_a_batch_of_padding_has_no_router_loss():
    found = {"": routing([0, 0], [0, 0], 0)}
    added, _ = router_losses(found, MixtureConfig(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=1))
    assert added == 0


def test_moved_biases_by_hand():
    path = ("layers", "3::2", "mlp", "e_score_correction_bias")
    state = nnx.from_flat_state([(path, Balance(jnp.zeros((1, 3))))])
    stacked = jax.tree.map(lambda x: x[None], routing([1, 5, 3], [0, 0, 0], 9))
    moved = dict(nnx.to_flat_state(moved_biases(state, {"3::2": stacked}, 0.5)))[path].get_value()
    assert_array_equal(moved, [[0.5, -0.5, 0]])


def test_the_z_loss_is_a_mean_over_tokens_and_layers():
    layers = {
        "0": Routing(*map(np.float32, ([2, 2, 0, 0], [1, 1, 0, 0], 6, 0, 0, 2))),
        "1": Routing(*map(np.float32, ([4, 0, 0, 0], [2, 0, 0, 0], 10, 0, 0, 2))),
    }
    mixture = MixtureConfig(**MIXTURE, router_aux_loss_coef=0.0, router_z_loss_coef=0.5)
    assert_allclose(router_losses(layers, mixture)[0], 0.5 * (6 + 10) / 4)
