"""Attention without a running maximum: that the models' bound on their logits is true, tight, and changes nothing."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_folders import model_config
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from numpy.testing import assert_allclose

from kernels import Mask, backends
from vishwamai import experiment as experiments
from vishwamai import families
from vishwamai.config import ConfigError
from vishwamai.data.batch import Batch
from vishwamai.models import attention
from vishwamai.models.attention import Attention
from vishwamai.models.config import LayerType, Remat, RopeScaling, Softmax, TextConfig
from vishwamai.models.rope import rotary
from vishwamai.models.transformer import Transformer

HEADS, TOKENS = 3, 9
YARN = RopeScaling(rope_type="yarn", factor=40.0, original_max_position_embeddings=512)
LOCAL = dict(rope_local_base_freq=100.0, sliding_window=4, layer_types=(LayerType.SLIDING,))
CASES = {
    "qwen3": (64, "float32", {}),
    "qwen3, bfloat16": (64, "bfloat16", {}),
    "five pairs": (10, "float32", {}),
    "one pair, bfloat16": (2, "bfloat16", {}),
    "yarn": (10, "float32", dict(rope_scaling=YARN)),
    "yarn, bfloat16": (10, "bfloat16", dict(rope_scaling=YARN)),
    "yarn, but not of local layers": (10, "float32", dict(rope_scaling=YARN, **LOCAL)),
    "gemma 3": (16, "float32", dict(zero_centered_norms=True, query_pre_attn_scalar=100.0, **LOCAL)),
    "gemma 3, bfloat16": (16, "bfloat16", dict(zero_centered_norms=True, query_pre_attn_scalar=100.0, **LOCAL)),
}


def text_config(head_dim=8, **changes):
    sizes = dict(vocab_size=40, hidden_size=HEADS * head_dim, intermediate_size=16, num_hidden_layers=2)
    return TextConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=head_dim, **changes)


@partial(jax.jit, static_argnums=(0, 1))
def handed_over(config, dtype, gains, x, positions):
    """What a layer whose heads see a part of x each gives to the kernel: queries, keys, and their bound."""
    kind, seen = config.kinds[0].attention, []
    layer = Attention(config, kind, rngs=nnx.Rngs(0))
    layer.q_norm.scale.set_value(gains[0])
    layer.k_norm.scale.set_value(gains[1])
    for project in (layer.q_proj, layer.k_proj):
        project.kernel.set_value(jnp.eye(config.hidden_size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attention", lambda q, k, *_, max_logit, **__: seen.append((q, k, max_logit)) or q)
        angles = {kind: rotary(positions, config.head_dim, *config.rope(kind))}
        layer(x.astype(dtype), angles, Mask(causal=True), softmax=Softmax.BOUNDED)
    return seen[0]


def highest(config, dtype, gains, x, positions):
    """(the largest |logit| of all queries and keys, what is said to bound it)."""
    q, k, bound = handed_over(config, dtype, gains, x, positions)
    products = np.einsum("btnh,bsnh->bnts", np.float64(q), np.float64(k))
    return np.abs(products).max() * (config.query_pre_attn_scalar or config.head_dim) ** -0.5, float(bound)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), decades=st.sampled_from([0.0, 0.3, 3.0]), far=st.integers(0, 30_000))
def test_no_logit_exceeds_the_bound(name, seed, decades, far):
    """Random gains of either sign and many sizes; tokens at random, and some that point where gains are large."""
    head_dim, dtype, changes = CASES[name]
    config, draw = text_config(head_dim, **changes), np.random.default_rng(seed)
    gains = np.float32(draw.choice([-1, 1], (2, head_dim)) * 10 ** draw.uniform(-decades, decades, (2, head_dim)))
    x = draw.standard_normal((1, TOKENS, HEADS, head_dim), np.float32)
    x[:, :3] *= np.abs(gains[0] * gains[1]) ** 4 + 1e-3
    x[0, 3, :, np.argmax(np.abs(gains[0] * gains[1]))] = 1e6
    positions = draw.integers(0, far + 1, (1, TOKENS))
    logit, bound = highest(config, dtype, gains, x.reshape(1, TOKENS, -1), positions)
    assert logit <= bound


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_reached(name):
    """By a token that has all its length in the pair with the largest gains, and looks at itself."""
    head_dim, dtype, changes = CASES[name]
    config, draw = text_config(head_dim, **changes), np.random.default_rng(3)
    gains = np.float32(np.tile(draw.uniform(-3, -1, (2, head_dim // 2)), 2))
    of_both = np.prod(1 + gains if config.zero_centered_norms else gains, axis=0)
    x = np.zeros((1, TOKENS, HEADS, head_dim), np.float32)
    x[..., np.argmax(of_both)] = 1e4
    logit, bound = highest(config, dtype, gains, x.reshape(1, TOKENS, -1), np.arange(TOKENS)[None] * 1000)
    assert (0.999 if dtype == "float32" else 0.95) * bound < logit <= bound


def test_a_soft_cap_is_a_bound_too():
    capped, layer = partial(text_config, attn_logit_softcapping=4.0), partial(Attention, rngs=nnx.Rngs(0))
    bound = lambda config: float(layer(config, LayerType.FULL).max_logit(jnp.float32))  # noqa: E731
    assert bound(capped(64)) == 4.0 == bound(capped(64, qk_norm=False))
    assert_allclose(bound(capped(8)), 8**0.5, rtol=2e-4)


def rows(config):
    """Two packed texts in each row."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20), np.int32)
    segments = np.repeat([[1] * 7 + [2] * 11 + [0] * 2], 2, axis=0)
    return Batch(tokens, np.repeat([[*range(7), *range(11), 0, 0]], 2, axis=0), segments, np.float32(segments > 0))


@contextlib.contextmanager
def on_tpu():
    """Attention takes the TPU's kernel, interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "target", lambda: "tpu")
        patch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
        yield


def logits_of(graph, softmax, remat, parameters):
    model = nnx.merge(graph, parameters)
    batch = rows(model.language_model.config)
    logits = model.unembed(model.decoded(batch, remat=remat, softmax=softmax).hidden)
    return jnp.where(batch.segment_ids[..., None] > 0, logits, 0)


def outcome(model, softmax, remat=Remat.NONE):
    """Logits, and gradients of all parameters."""
    graph, parameters = nnx.split(model)
    push = np.random.default_rng(1).standard_normal((2, 20, model.config.vocab_size), np.float32)

    @jax.jit
    def run(parameters):
        logits, pull = jax.vjp(partial(logits_of, graph, softmax, remat), parameters)
        return logits, pull(push)

    return jax.tree.leaves(run(parameters))


def logits(model, softmax):
    graph, parameters = nnx.split(model)
    return jax.jit(partial(logits_of, graph, softmax, Remat.NONE))(parameters)


ALTERNATING = dict(sliding_window=5, layer_types=("sliding_attention", "full_attention"), num_hidden_layers=5)


@pytest.mark.parametrize("remat, changes", [
    (Remat.FULL, dict(attn_logit_softcapping=20.0)),
    pytest.param(Remat.DOTS, ALTERNATING | dict(zero_centered_norms=True), marks=pytest.mark.slow),
], ids=["one stack", "two stacks and a layer"])  # fmt: skip
def test_a_model_computes_the_same(remat, changes):
    model = Transformer(text_config(8).model_copy(update=changes), rngs=nnx.Rngs(0))
    with on_tpu():
        running, bounded = (outcome(model, softmax, remat) for softmax in Softmax)
    assert any(np.any(a != b) for a, b in zip(running, bounded, strict=True)), "was it another kernel?"
    for expected, found in zip(running, bounded, strict=True):
        assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_gains_too_large_for_it_are_computed_with_a_running_maximum():
    model = Transformer(text_config(8), rngs=nnx.Rngs(0))
    for norm in (model.layers.self_attn.q_norm, model.layers.self_attn.k_norm):
        norm.scale[...] *= 30
    with on_tpu():
        running, bounded = (logits(model, softmax) for softmax in Softmax)
    np.testing.assert_array_equal(bounded, running)


@pytest.mark.slow
def test_a_document_model_has_it_through_its_decoder():
    config = model_config("parsit")
    model = families.get("parsit").build(config, rngs=nnx.Rngs(0))
    with on_tpu():
        running, bounded = (logits(model, softmax) for softmax in Softmax)
    assert np.any(running != bounded)
    assert_allclose(bounded, running, atol=1e-5 * np.abs(running).max())


def experiment_of(family):
    data = {"generated": "primer", "task": "transcribe"} if family == "parsit" else {"path": "x.txt"}
    tree = dict(family=family, run_dir="x", tokenizer="x", model=model_config(family).model_dump(mode="json"))
    tree |= dict(data={"max_length": 8, "datasets": [data]})
    tree |= dict(training=dict(steps=1, batch_size=1, attention_softmax="bounded"))
    return experiments.parse(tree, "x.yaml")


def test_a_step_tells_the_highest_bound_of_all_layers(trainer_for, source):
    """By which one sees whether the kernel without a maximum runs."""
    model = Transformer(text_config(8).model_copy(update=ALTERNATING), rngs=nnx.Rngs(0))
    layers = [module for _, module in nnx.iter_graph(model) if isinstance(module, Attention)]
    for seed, layer in enumerate(layers):
        layer.q_norm.scale.set_value(jax.random.normal(jax.random.key(seed), layer.q_norm.scale[...].shape))
    each = [float(layer.self_attn.max_logit(jnp.bfloat16)) for layer in model.one_by_one()]
    assert len(set(each)) == 5 and float(model.max_logit(jnp.bfloat16)) == max(each)
    for softmax in Softmax:
        trainer = trainer_for(training={"attention_softmax": softmax})
        with jax.set_mesh(trainer.mesh):
            _, metrics = trainer.step.__wrapped__.eval_shape(trainer.abstract, source.batch(0))
        assert ("max_logit" in metrics) == (softmax is Softmax.BOUNDED)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gemma2", "gemma3", "parsit"])
def test_a_run_asks_for_it(family):
    assert experiment_of(family).training.attention_softmax is Softmax.BOUNDED


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2"])
def test_a_model_without_a_bound_refuses_it(family):
    with pytest.raises(ConfigError, match="attention_softmax=bounded, but nothing bounds the logits of this model"):
        experiment_of(family)
    model = nnx.eval_shape(lambda: families.get(family).build(model_config(family), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="softmax=bounded: nothing bounds the logits of a model without qk_norm"):
        jax.eval_shape(partial(logits_of, nnx.graphdef(model), Softmax.BOUNDED, Remat.NONE), nnx.state(model))
