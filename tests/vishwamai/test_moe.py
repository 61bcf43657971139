"""Mixture layers against the dense form: every way to send tokens to experts is the same maths."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jaxprs import precisions

from vishwamai.data.batch import text_batch
from vishwamai.models.config import MixtureConfig, TextConfig
from vishwamai.models.moe import MixtureOfExperts, bounded, dense, dropless
from vishwamai.models.transformer import Transformer
from vishwamai.parallel.mesh import AXES
from vishwamai.parallel.sharding import parameter_shardings, row_sharding

SIZES = dict(
    vocab_size=16, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=4, initializer_range=0.5,
)  # fmt: skip


def config(**mixture) -> TextConfig:
    fixed = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=7)
    return TextConfig(**SIZES, mixture=MixtureConfig(**(fixed | mixture)))


def layer(seed=0, **mixture) -> MixtureOfExperts:
    return MixtureOfExperts(config(**mixture), rngs=nnx.Rngs(seed))


def tokens(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, 12)), jnp.float32)


def chosen(*shape, experts=5, k=2, seed=2):
    """k different experts for each token, and weights."""
    draw = np.random.default_rng(seed)
    found = np.argsort(draw.random((*shape, experts)), axis=-1)[..., :k]
    return jnp.asarray(found, jnp.int32), jnp.asarray(draw.random((*shape, k)), jnp.float32)


def of(experts):
    return experts.matrices(jnp.float32), experts.act


def values_and_gradients(way, rows, experts, weights, module):
    """The output, and the gradients of its weighted sum by rows, weights and the experts' parameters."""
    graph, state = nnx.split(module.experts)

    def run(rows, weights, state):
        return way(rows, experts, weights, *of(nnx.merge(graph, state)))

    out, back = jax.vjp(run, rows, weights, state)
    direction = np.random.default_rng(3).normal(size=rows.shape[-2:])
    return [out, *jax.tree.leaves(back(jnp.broadcast_to(jnp.asarray(direction, out.dtype), out.shape)))]


def assert_same(found, expected, limit=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= limit * max(1, np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("count", [1, 2, 37, 300])
def test_dropless_equals_dense(count):
    case = tokens(count), *chosen(count), layer()
    assert_same(values_and_gradients(dropless, *case), values_and_gradients(dense, *case))


def test_an_expert_without_tokens_gets_no_gradient_at_all():
    experts, weights = chosen(40, experts=3)
    *_, down, gate, up = values_and_gradients(dropless, tokens(40), experts, weights, layer())
    for gradient in (down, gate, up):
        assert np.all(np.asarray(gradient)[3:] == 0)
        assert all(np.any(of) for of in np.asarray(gradient)[:3])


def test_all_tokens_to_one_expert():
    experts, weights = jnp.full((50, 1), 3), jnp.ones((50, 1))
    case = tokens(50), experts, weights, layer()
    assert_same(values_and_gradients(dropless, *case), values_and_gradients(dense, *case))


def test_permuting_experts_changes_nothing():
    module, x, real = layer(), tokens(2, 19), jnp.ones((2, 19), bool)
    before, routing = module(x, real)
    order = np.array([3, 0, 4, 2, 1])
    module.gate.kernel.set_value(module.gate.kernel[...][:, order])
    for name in ("gate_proj", "up_proj", "down_proj"):
        matrix = getattr(module.experts, name)
        matrix.set_value(matrix[...][order])
    after, moved = module(x, real)
    np.testing.assert_allclose(after, before, atol=1e-5)
    np.testing.assert_array_equal(moved.load, routing.load[order])


def test_enough_capacity_drops_nothing():
    """Every expert has room for a whole row."""
    module, rows = layer(), tokens(3, 17)
    experts, weights = chosen(3, 17)
    flat = (a.reshape(-1, a.shape[-1]) for a in (rows, experts, weights))
    expected = dropless(*flat, *of(module.experts)).reshape(rows.shape)
    found, dropped = bounded(rows, experts, weights, *of(module.experts), 17)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert dropped == 0

    def way(*arguments):
        return bounded(*arguments, 17)[0]

    one = rows[:1], experts[:1], weights[:1]
    expected = values_and_gradients(dense, *(a[0] for a in one), module)
    out, by_row, by_weight, *by_expert = values_and_gradients(way, *one, module)
    assert_same([out[0], by_row[0], by_weight[0], *by_expert], expected)


def test_what_finds_no_room_is_dropped_and_counted():
    """First choices before second ones, early tokens before late ones; a row's drops are its own."""
    experts = jnp.array([[[0, 1], [0, 1], [1, 0], [2, 0]], [[3, 4]] * 4])
    weights = jnp.full((2, 4, 2), 0.5)
    module, rows = layer(), tokens(2, 4)
    found, dropped = bounded(rows, experts, weights, *of(module.experts), 2)
    # Row 0: expert 0 takes the first choices of tokens 0 and 1, so the second ones of tokens 2 and 3 find no room;
    # expert 1 takes token 2 and the second choice of token 0. Row 1: two of four for either expert.
    kept = np.array([[[1, 1], [1, 0], [1, 0], [1, 0]], [[1, 1], [1, 1], [0, 0], [0, 0]]])
    assert dropped == kept.size - kept.sum() == 7
    for row in range(2):
        expected = dense(rows[row], experts[row], weights[row] * kept[row], *of(module.experts))
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_padding_goes_nowhere_and_counts_nowhere(capacity_factor):
    module = layer(capacity_factor=capacity_factor)
    x, real = tokens(2, 11), jnp.arange(11) < jnp.array([[11], [4]])
    out, routing = module(x, real, drops=True)
    poisoned, same = module(jnp.where(real[:, :, None], x, jnp.nan), real, drops=True)
    np.testing.assert_array_equal(np.asarray(out)[np.asarray(real)], np.asarray(poisoned)[np.asarray(real)])
    assert np.all(np.asarray(out)[~np.asarray(real)] == 0)
    assert_same(same, routing, 0)
    assert routing.tokens == 15 and routing.load.sum() == 30
    assert np.isclose(routing.probability.sum(), 15)
    assert 0 < routing.entropy < 15 * np.log(5) + 1e-4


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2)], ids=str)
def test_gradients_of_experts_are_scattered_as_the_experts_are(sizes):
    """On data, fsdp, tensor as on one device. A device never holds a whole sum of which it keeps a part."""
    module, x, real = layer(moe_intermediate_size=6), tokens(4, 9), jnp.arange(9) < jnp.array([[9], [4], [9], [0]])
    graph, state = nnx.split(module)

    def run(state, x):
        return nnx.merge(graph, state)(x, real)[0]

    def everything(state, x, direction):
        out, back = jax.vjp(run, state, x)
        return out, *back(direction)

    case = state, x, tokens(4, 9, seed=5)
    mesh = jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(sizes)])
    places = parameter_shardings(state, mesh), *[row_sharding(mesh)] * 2
    with jax.set_mesh(mesh):
        traced = jax.jit(everything, in_shardings=places).trace(*case)
        program = traced.lower().compile()
    found, expected = program(*jax.device_put(case, places)), jax.jit(everything)(*case)
    assert_same(jax.tree.leaves(found), jax.tree.leaves(expected))
    # Forward and backward gather each of three, so that nothing whole is kept between them.
    assert str(traced.jaxpr).count(" all_gather[") == 6 and str(traced.jaxpr).count(" reduce_scatter[") == 3
    whole = 5 * 12 * 6 // sizes[2]
    sums = " ".join(re.findall(r" = (.+) all-reduce\(", program.as_text()))
    assert all(np.prod([int(size) for size in shape.split(",")]) < whole for shape in re.findall(r"\[([\d,]+)\]", sums))


@pytest.mark.parametrize("drops", [False, True])
def test_shared_experts_see_every_token(drops):
    module, x, real = layer(n_shared_experts=2, capacity_factor=0.5), tokens(2, 9), jnp.ones((2, 9), bool)
    assert module.shared_experts.up_proj.kernel.shape == (12, 14)
    out, routing = module(x, real, drops)
    shared = module.shared_experts(x)
    del module.shared_experts
    np.testing.assert_allclose(out - shared, module(x, real, drops)[0], atol=1e-5)
    assert (routing.dropped > 0) == drops


def test_only_training_drops():
    """What a trained model answers does not depend on its capacity, as it doesn't where it is exported to."""
    batch = text_batch(np.random.default_rng(0).integers(0, 16, (2, 15)))
    found = []
    for factor in (None, 0.3):
        model = Transformer(config(capacity_factor=factor), rngs=nnx.Rngs(0))
        prompt = model.embed(batch), batch.positions, model.mask(batch), jnp.ones((2, 20), jnp.int32)
        found.append([model.decoded(batch).hidden, model.prefill(*prompt)[0], model.decoded(batch, drops=True).hidden])
    plain, bounded_one = found
    np.testing.assert_array_equal(plain[0], bounded_one[0])
    np.testing.assert_array_equal(plain[1], bounded_one[1])
    assert np.abs(np.asarray(plain[2] - bounded_one[2])).max() > 1e-3


def test_routers_multiply_in_float32_on_every_chip():
    """Their logits, and the gradients of rows and kernel; products of the experts are in bfloat16."""
    graph, state = nnx.split(layer())

    def loss(state, x):
        return nnx.merge(graph, state)(x, jnp.ones(x.shape[:2], bool))[0].astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(state, tokens(2, 6).astype(jnp.bfloat16)).jaxpr
    found = list(precisions(jaxpr))
    assert found.count(jax.lax.Precision.HIGHEST) == 2 * 3 and len(found) > 2 * 3  # of two operands each


def test_sigmoid_routers_choose_by_score_and_bias_and_weigh_by_score():
    module = layer(scoring_func="sigmoid", norm_topk_prob=False, routed_scaling_factor=2.5)
    logits = module.gate(tokens(30))
    module.e_score_correction_bias.set_value(jnp.array([0.0, 9.0, 0.0, 0.0, 0.0]))
    routes = module.routes(logits)
    assert np.all(np.any(np.asarray(routes.experts) == 1, axis=1))
    expected = 2.5 * np.take_along_axis(np.asarray(jax.nn.sigmoid(logits)), np.asarray(routes.experts), axis=1)
    np.testing.assert_allclose(routes.weights, expected, rtol=1e-5)


def test_a_tokens_experts_are_of_its_best_groups():
    """DeepSeek-V3's choice, by hand: three of three pairs of experts would often be chosen, two may."""
    grouped = dict(num_experts=6, num_experts_per_tok=3, n_group=3, topk_group=2)
    module = layer(scoring_func="sigmoid", routed_scaling_factor=2.5, **grouped)
    x, bias = tokens(2, 40), np.array([0.1, -0.2, 0.0, 0.3, 0.0, -0.1])
    module.e_score_correction_bias.set_value(jnp.asarray(bias, jnp.float32))
    scores = 1 / (1 + np.exp(-np.asarray(module.gate(x.reshape(80, 12)), np.float64)))
    ranked = scores + bias
    worst = np.argmin(ranked.reshape(80, 3, 2).sum(axis=2), axis=1)
    experts = np.argsort(-np.where(np.arange(6) // 2 == worst[:, None], -np.inf, ranked), axis=1)[:, :3]
    assert np.any(np.sort(experts) != np.sort(np.argsort(-ranked, axis=1)[:, :3])), "groups change the choice"
    weights = np.take_along_axis(scores, experts, axis=1)
    weights = jnp.asarray(2.5 * weights / weights.sum(axis=1, keepdims=True), jnp.float32)
    expected = dense(x.reshape(80, 12), jnp.asarray(experts), weights, *of(module.experts))
    out, routing = module(x, jnp.ones((2, 40), bool))
    np.testing.assert_allclose(out.reshape(80, 12), expected, atol=1e-5)
    np.testing.assert_array_equal(routing.load, np.bincount(experts.reshape(-1), minlength=6))


@pytest.mark.parametrize(
    "mixture, message",
    [
        (dict(num_experts_per_tok=6), "num_experts_per_tok=6 is more than num_experts=5"),
        (dict(router_bias_update_rate=0.001), "set scoring_func to sigmoid"),
        (dict(n_group=2), "num_experts=5 must be a multiple of n_group"),
        (dict(n_group=5, topk_group=6), "topk_group=6 of n_group=5"),
        (dict(n_group=5), "num_experts_per_tok=2 is more than the 1 experts of topk_group=1 of n_group=5"),
        (dict(mlp_only_layers=(0,)), "none of the 1 layers is one"),
    ],
)
def test_mixtures_that_make_no_sense(mixture, message):
    with pytest.raises(ValueError, match=message):
        config(**mixture)
