"""Schedules against closed forms, AdamW against float64, and which parameters train."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from vishwamai.config import ConfigError
from vishwamai.experiment import OptimizerConfig
from vishwamai.models.layers import Carried
from vishwamai.training.optimizer import learning_rate, make_optimizer, partition, path_name


def closed_form(config: OptimizerConfig, steps: int, step: int) -> float:
    warmup, peak, end = config.warmup_steps, config.learning_rate, config.learning_rate * config.final_fraction
    if step < warmup:
        return peak / (warmup + 1) * (1 - step / warmup) + peak * step / warmup
    rest, at = steps - warmup, step - warmup
    match config.schedule:
        case "constant":
            return peak
        case "cosine":
            return end + (peak - end) * (1 + math.cos(math.pi * min(at / rest, 1))) / 2
        case "wsd":
            decay = int(rest * config.decay_fraction)
            return peak + (end - peak) * min(max(at - (rest - decay), 0) / decay, 1)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_schedules(schedule, warmup):
    config = OptimizerConfig(learning_rate=2e-3, schedule=schedule, warmup_steps=warmup, final_fraction=0.2)
    found = learning_rate(config, 110)
    for step in (0, 1, 5, 9, 10, 11, 50, 89, 90, 91, 100, 109, 110, 200):
        assert_allclose(found(step), closed_form(config, 110, step), rtol=1e-5, err_msg=f"step {step}")
    assert found(0) > 0


def test_a_schedule_of_one_step_is_defined():
    for schedule in ("constant", "cosine", "wsd"):
        assert learning_rate(OptimizerConfig(schedule=schedule, warmup_steps=5), 1)(0) > 0


def model_state():
    draw = np.random.default_rng(0)
    param = lambda shape, axes, kind=nnx.Param: kind(jnp.float32(draw.normal(size=shape)), axes=axes)  # noqa: E731
    return nnx.State(
        {
            "layers": {
                "proj": {"kernel": param((2, 4, 3), ("embed", "mlp")), "bias": param((2, 3), ("mlp",))},
                "norm": {"scale": param((2, 4), ("norm",))},
            },
            "head": {"kernel": param((4, 5), ("embed", "vocab"))},
            "unused": {"kernel": param((4, 4), ("embed", "mlp"), Carried)},
        }
    )


def names(state):
    return {path_name(path) for path, _ in nnx.to_flat_state(state)}


def arrays(state):
    return {path_name(path): np.asarray(v.get_value(), np.float64) for path, v in nnx.to_flat_state(state)}


def test_partition_takes_what_the_globs_name():
    trainable, frozen = partition(model_state(), ["layers.proj.*", "head.kernel"])
    assert names(trainable) == {"layers.proj.kernel", "layers.proj.bias", "head.kernel"}
    assert names(frozen) == {"layers.norm.scale", "unused.kernel"}


def test_carried_weights_never_train():
    trainable, _ = partition(model_state(), ["*"])
    assert "unused.kernel" not in names(trainable)
    with pytest.raises(ConfigError, match="'unused.*' matches no parameter"):
        partition(model_state(), ["unused.*"])


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="training.trainable: 'langauge_model.*' matches no parameter; .*head.kernel"):
        partition(model_state(), ["head.*", "langauge_model.*"])
    trainable, _ = partition(model_state(), ["head.*"])
    config = OptimizerConfig(learning_rate_scales={"layers.*": 0.1})
    with pytest.raises(ConfigError, match="optimizer.learning_rate_scales: 'layers.*' matches no parameter"):
        make_optimizer(config, 10, trainable)


def adamw(parameters, gradients, config, rates, scales):
    """AdamW with clipping in float64 (Loshchilov & Hutter 2019, algorithm 2)."""
    first = {name: np.zeros_like(x) for name, x in parameters.items()}
    second = {name: np.zeros_like(x) for name, x in parameters.items()}
    for step, (rate, gradient) in enumerate(zip(rates, gradients, strict=True), 1):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, x in parameters.items():
            g = gradient[name] * min(1, config.clip_norm / norm)
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
            update = first[name] / (1 - config.beta1**step)
            update /= np.sqrt(second[name] / (1 - config.beta2**step)) + config.epsilon
            decay = config.weight_decay * x if name.endswith("kernel") else 0
            parameters[name] = x - scales.get(name, 1) * rate * (update + decay)
    return parameters


def test_adamw_equals_its_definition():
    config = OptimizerConfig(
        learning_rate=0.05, warmup_steps=2, weight_decay=0.3, clip_norm=0.7, learning_rate_scales={"head.*": 0.25}
    )
    trainable, _ = partition(model_state(), ["*"])
    optimizer = make_optimizer(config, 5, trainable)
    state, moments = trainable, optimizer.init(trainable)
    draw = np.random.default_rng(7)
    gradients = []
    for size in (0.01, 10.0, 1.0, 0.001):  # below and above the clipping norm
        gradient = jax.tree.map(lambda x, size=size: jnp.float32(draw.normal(size=x.shape) * size), trainable)
        gradients.append(arrays(gradient))
        updates, moments = optimizer.update(gradient, moments, state)
        state = jax.tree.map(jnp.add, state, updates)
    rates = [closed_form(config, 5, step) for step in range(4)]
    expected = adamw(arrays(trainable), gradients, config, rates, {"head.kernel": 0.25})
    for name, found in arrays(state).items():
        assert_allclose(found, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_weight_decay_leaves_norms_and_biases():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    trainable, _ = partition(model_state(), ["*"])
    optimizer = make_optimizer(config, 5, trainable)
    zero = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = optimizer.update(zero, optimizer.init(trainable), trainable)
    before = arrays(trainable)
    for name, update in arrays(updates).items():
        assert_array_equal(update != 0, np.full_like(update, name.endswith("kernel"), bool), err_msg=name)
        if name.endswith("kernel"):
            assert_allclose(update, -0.05 * before[name], rtol=1e-5)
