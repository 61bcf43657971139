"""The train step: micro-batches, meshes and freezing change nothing that they should not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxprs import array_sizes
from numpy.testing import assert_allclose, assert_array_equal

from vishwamai.config import ConfigError
from vishwamai.training.metrics import means
from vishwamai.training.optimizer import path_name


def losses(trainer, source, steps=5):
    state, found = trainer.initial(), []
    for step in range(steps):
        state, metrics = trainer.step(state, source.batch(step))
        found.append(means(jax.device_get(metrics)))
    return found


@pytest.fixture(scope="module")
def expected():
    """What one device and one big batch give; filled by the first test that needs it."""
    return {}


@pytest.fixture
def on_one_device(expected, trainer_for, source):
    if not expected:
        expected["metrics"] = losses(trainer_for(), source)
    return expected["metrics"]


def test_it_learns(on_one_device):
    assert on_one_device[-1]["loss"] < on_one_device[0]["loss"] - 0.01
    assert all(metrics["healthy"] for metrics in on_one_device)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(trainer_for, source, on_one_device, parts):
    """Micro-batches hold unequal weights: a mean of their means would differ."""
    found = losses(trainer_for(training={"gradient_accumulation": parts}), source)
    for name in ("loss", "grad_norm", "accuracy"):
        assert_allclose([m[name] for m in found], [m[name] for m in on_one_device], atol=1e-6, err_msg=name)


QUICK_MESHES = [
    {"data": 2},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "tensor": -1},
]
SLOW_MESHES = [
    {"fsdp": 2},
    {"tensor": 2},
    {"data": 2, "fsdp": 2},
    {"data": 2, "tensor": 2},
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
]
MESHES = QUICK_MESHES + [pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW_MESHES]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_meshes_give_the_same_losses(trainer_for, source, on_one_device, mesh):
    trainer = trainer_for(mesh=mesh)
    assert trainer.mesh.size == abs(np.prod(list(mesh.values()))) or -1 in mesh.values()
    found = losses(trainer, source)
    assert_allclose([m["loss"] for m in found], [m["loss"] for m in on_one_device], atol=1e-5)
    state = trainer.initial()
    kernel = state.trainable["layers"]["mlp"]["up_proj"]["kernel"].get_value()
    assert (
        kernel.addressable_shards[0].data.size * trainer.mesh.shape["fsdp"] * trainer.mesh.shape["tensor"]
        == kernel.size
    )


@pytest.mark.parametrize(
    "training", [{}, {"loss_chunk": 512}, {"gradient_accumulation": 2}, {"remat": "full"}], ids=str
)
def test_no_step_makes_the_logits_of_a_whole_batch(trainer_for, source, training):
    trainer = trainer_for(model={"vocab_size": 4096}, training=training)
    with jax.set_mesh(trainer.mesh):
        jaxpr = jax.make_jaxpr(trainer.step.__wrapped__)(trainer.abstract, source.batch(0)).jaxpr
    of_a_micro_batch = 8 // training.get("gradient_accumulation", 1) * 21 * 4096
    assert 4096 * 32 <= max(array_sizes(jaxpr)) < 0.6 * of_a_micro_batch


def test_accumulation_on_a_mesh(trainer_for, source, on_one_device):
    found = losses(trainer_for(mesh={"data": 2, "tensor": 2}, training={"gradient_accumulation": 4}), source)
    assert_allclose([m["loss"] for m in found], [m["loss"] for m in on_one_device], atol=1e-5)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_nothing_but_memory(trainer_for, source, on_one_device, remat):
    found = losses(trainer_for(training={"remat": remat}), source)
    assert_allclose([m["loss"] for m in found], [m["loss"] for m in on_one_device], atol=1e-6)


def test_bfloat16_computes_and_keeps_float32_parameters(trainer_for, source, on_one_device):
    trainer = trainer_for(training={"dtype": "bfloat16"})
    found = losses(trainer, source)
    difference = abs(np.subtract([m["loss"] for m in found], [m["loss"] for m in on_one_device]))
    assert 0 < difference.max() < 0.02
    assert {x.dtype for x in jax.tree.leaves(trainer.abstract.trainable)} == {jnp.dtype("float32")}


def test_z_loss_is_told_apart_and_added(trainer_for, source, on_one_device):
    found = losses(trainer_for(training={"z_loss": 1e-2}), source)
    assert_allclose(found[0]["loss"], on_one_device[0]["loss"], rtol=1e-6)
    # Logits start near 0, so log(Z) is about log(64).
    assert_allclose(found[0]["z_loss"], 1e-2 * np.log(64) ** 2, rtol=0.02)
    assert found[0]["grad_norm"] != on_one_device[0]["grad_norm"]


def test_frozen_parameters_keep_every_bit(trainer_for, source):
    trainer = trainer_for(training={"trainable": ["layers.self_attn.*", "norm.scale"]})
    state = trainer.initial()
    before = {path_name(path): np.array(v.get_value()) for path, v in nnx.to_flat_state(state.parameters)}
    for step in range(2):
        state, _ = trainer.step(state, source.batch(step))
    for path, variable in nnx.to_flat_state(state.parameters):
        name, after = path_name(path), np.asarray(variable.get_value())
        trains = name.startswith("layers.self_attn.") or name == "norm.scale"
        assert np.array_equal(before[name], after) != trains, name
    moments = sum(x.size for x in jax.tree.leaves(trainer.abstract.optimizer))
    trained = sum(x.size for x in jax.tree.leaves(trainer.abstract.trainable))
    assert trained == 3 * (4 * 32 * 32 + 2 * 4) + 32
    assert moments == 2 * trained + 2  # and two counts


def test_state_holds_still_at_a_bad_batch(trainer_for, source):
    trainer = trainer_for()
    state, _ = trainer.step(trainer.initial(), source.batch(0))
    before = jax.tree.map(np.array, state)
    bad = source.batch(1)
    bad.loss_weights[2, 3:6] = np.nan
    for batch in (bad, source.batch(2)):  # a healthy batch after it moves nothing either
        state, metrics = trainer.step(state, batch)
        assert not metrics["healthy"]
    assert int(state.step) == 1
    jax.tree.map(assert_array_equal, state.trainable, before.trainable)
    jax.tree.map(assert_array_equal, state.optimizer, before.optimizer)


def test_rows_that_cannot_be_dealt_out_are_an_error(trainer_for):
    with pytest.raises(
        ConfigError, match="batch_size=8 is not a multiple of 16: gradient_accumulation=4 times 4 devices"
    ):
        trainer_for(mesh={"data": 2, "fsdp": 2}, training={"gradient_accumulation": 4})


def test_seed_decides_the_initial_weights(trainer_for):
    first, again, other = (trainer_for(seed=seed).initial().trainable for seed in (1, 1, 2))
    kernel = lambda state: np.asarray(state["layers"]["mlp"]["up_proj"]["kernel"].get_value())  # noqa: E731
    assert_array_equal(kernel(first), kernel(again))
    assert not np.array_equal(kernel(first), kernel(other))
    assert not np.array_equal(kernel(first)[0], kernel(first)[1])  # layers start apart
