"""Our decoder against Transformers, family by family: logits, loss and every gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import quick_and_slow
from flax import nnx
from parity import LOGITS, assert_close, assert_gradients, decoder, saved, stretched, torch

from vishwamai import VishwamAI
from vishwamai.data.batch import text_batch
from vishwamai.training.losses import next_token_loss

QWEN3 = {
    "tied, 1:1": dict(tie_word_embeddings=True, num_key_value_heads=8),
    "tied, 8:1": dict(tie_word_embeddings=True, num_key_value_heads=1),
    "untied, 1:1": dict(tie_word_embeddings=False, num_key_value_heads=8),
    "untied, 8:1": dict(tie_word_embeddings=False, num_key_value_heads=1),
}
LLAMA3 = stretched("llama3", low_freq_factor=1.0, high_freq_factor=4.0)
WINDOW = dict(use_sliding_window=True, sliding_window=9, max_window_layers=0)
OTHERS = {  # what each family adds to the maths, once
    "qwen3, biases, yarn": dict(attention_bias=True, **stretched("yarn", mscale=1.0, mscale_all_dim=0.5)),
    "qwen3, window": dict(**WINDOW),
    "qwen2": dict(family="qwen2"),
    "qwen2, window, yarn": dict(family="qwen2", **WINDOW, **stretched("yarn", beta_fast=8.0)),
    "llama": dict(family="llama", tie_word_embeddings=False, **LLAMA3),
    "llama, biases, linear": dict(family="llama", attention_bias=True, mlp_bias=True, **stretched("linear")),
    "mistral": dict(family="mistral", sliding_window=None),
    "mistral, window": dict(family="mistral", sliding_window=7),
    "qwen3, windows behind": dict(**{**WINDOW, "max_window_layers": 1}),
    "qwen2, windows in turn": dict(
        family="qwen2", num_hidden_layers=5, use_sliding_window=True, sliding_window=9,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    ),
    "gemma2": dict(family="gemma2"),
    "gemma3": dict(family="gemma3"),
    "gemma3, soft-cap, bases, linear": dict(
        family="gemma3", num_hidden_layers=13, final_logit_softcapping=1.5,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 300_000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        },
        tie_word_embeddings=False,
    ),
    "mixtral": dict(family="mixtral", tie_word_embeddings=False),
    "mixtral, window": dict(family="mixtral", sliding_window=7),
    "qwen3_moe": dict(family="qwen3_moe", norm_topk_prob=True, tie_word_embeddings=False),
    "qwen3_moe, some dense, window": dict(
        family="qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0], decoder_sparse_step=2, use_sliding_window=True,
        sliding_window=9,
    ),
}  # fmt: skip


def opened(kind, tmp_path_factory):
    theirs = decoder(**kind)
    return theirs, VishwamAI.from_pretrained(saved(theirs, tmp_path_factory.mktemp("decoder")))


@pytest.fixture(scope="module", params=quick_and_slow(QWEN3, ["tied, 8:1", "untied, 1:1"]))
def pair(request, tmp_path_factory):
    return opened(request.param, tmp_path_factory)


QUICK = [
    "qwen3, biases, yarn",
    "qwen2, window, yarn",
    "llama",
    "mistral, window",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
]


@pytest.fixture(scope="module", params=quick_and_slow(OTHERS, QUICK))
def other(request, tmp_path_factory):
    return opened(request.param, tmp_path_factory)


def tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, 199, (rows, length))


def test_logits(pair):
    theirs, ours = pair
    ids = tokens(3, 37)
    logits = ours(ids)
    assert_close(logits, theirs(torch.tensor(ids)).logits)
    assert np.abs(np.asarray(logits)).max() > 0.5  # not a comparison of zeros


def test_logits_with_left_and_right_padding(pair):
    theirs, ours = pair
    ids, mask = tokens(3, 29), np.ones((3, 29), int)
    mask[0, :11], mask[1, :28], mask[2, 17:] = 0, 0, 0
    logits = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    got = np.asarray(ours(ids, mask))
    assert np.isfinite(got).all()
    assert_close(got[mask == 1], logits[torch.tensor(mask) == 1])


def test_logits_with_a_gap_in_the_mask(pair):
    theirs, ours = pair
    ids, mask = tokens(1, 20), np.ones((1, 20), int)
    mask[0, :3], mask[0, 8:12] = 0, 0
    logits = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    assert_close(np.asarray(ours(ids, mask))[mask == 1], logits[torch.tensor(mask) == 1])


def test_a_long_prompt(pair):
    theirs, ours = pair
    ids = tokens(1, 2000)
    with torch.no_grad():
        assert_close(ours(ids), theirs(torch.tensor(ids)).logits)


def test_loss_and_gradients(pair):
    assert_same_gradients(*pair)


def test_other_families_logits(other):
    """With padding on either side; far longer than the window and than the context before stretching."""
    theirs, ours = other
    ids, mask = tokens(2, 300), np.ones((2, 300), int)
    mask[0, :111], mask[1, 290:] = 0, 0
    with torch.no_grad():
        logits = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    assert_close(np.asarray(ours(ids, mask))[mask == 1], logits[torch.tensor(mask) == 1])


def test_other_families_loss_and_gradients(other):
    assert_same_gradients(*other)


def assert_same_gradients(theirs, ours):
    ids, weights = tokens(2, 41), np.ones((2, 41), np.float32)
    weights[0, 5:19] = 0  # a prompt
    labels = torch.tensor(np.where(weights > 0, ids, -100))
    theirs.zero_grad()
    loss = theirs(torch.tensor(ids), labels=labels).loss
    loss.backward()
    batch = dataclasses.replace(text_batch(ids), loss_weights=weights)

    def mean_loss(parameters):
        model = nnx.merge(ours.graph, parameters)
        return next_token_loss(model, model.hidden_states(batch), batch, chunk=16)[0] / weights[:, 1:].sum()

    value, gradients = jax.value_and_grad(mean_loss)(ours.parameters)
    assert abs(float(value) - loss.item()) <= 1e-5
    assert_gradients(gradients, theirs, ours.family.layout.rows(ours.config))


def test_bfloat16_is_close(pair):
    _, ours = pair
    narrow = VishwamAI.from_pretrained(ours.folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.parameters)} == {jnp.dtype(jnp.bfloat16)}
    ids = tokens(1, 16)
    logits = narrow(ids)
    assert logits.dtype == jnp.float32
    assert LOGITS < np.abs(np.asarray(logits) - np.asarray(ours(ids))).max() < 0.3


def test_takes_jax_arrays_and_refuses_what_is_no_batch_of_ids(pair):
    _, ours = pair
    assert ours(jnp.ones((1, 4), jnp.int32)).shape == (1, 4, 199)
    for wrong, message in [
        (np.array([[3, 199]]), r"holds 199; the vocabulary's ids are 0 to 198"),
        (np.array([[-1, 3]]), r"holds -1"),
        (np.array([3, 4]), r"shape B T, found int64 \(2,\)"),
        (np.array([[0.5]]), r"integers of shape B T, found float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours(wrong)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\)"):
        ours(np.ones((1, 4), int), np.ones((1, 3), int))
