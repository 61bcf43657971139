"""Rotary frequencies against Transformers', at the sizes of published models."""

import numpy as np
import pytest
from parity import torch, transformers

from vishwamai.models.config import RopeScaling
from vishwamai.models.rope import frequencies, rotary, rotate

SCALINGS = {
    "llama 3.1": dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192),
    "llama 3.2": dict(rope_type="llama3", factor=32.0, original_max_position_embeddings=8192, high_freq_factor=6.0),
    "qwen2.5, 128k": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    "yarn, sharpened by hand": dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=512, attention_factor=0.7, truncate=False
    ),
    "yarn, deepseek": dict(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.7
    ),
    "yarn, a short context": dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=8),
    "linear": dict(rope_type="linear", factor=2.5),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("head_dim, theta", [(128, 500_000.0), (64, 10_000.0)])
def test_frequencies_equal_transformers(scaling, head_dim, theta):
    scaling = RopeScaling(**scaling)
    sizes = dict(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=131072)
    known = {name: value for name, value in scaling.model_dump(mode="json").items() if value is not None}
    config = transformers.LlamaConfig(**sizes, rope_parameters={"rope_theta": theta, **known})
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling.rope_type.value]
    expected, factor = compute(config, torch.device("cpu"))
    found, our_factor = frequencies(head_dim, theta, scaling)
    assert found.dtype == np.float32 and our_factor == pytest.approx(factor, rel=1e-12)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    plain, _ = frequencies(head_dim, theta)
    assert (found <= plain * (1 + 1e-6)).all() and (found < plain * 0.9).any()


def test_rotations_keep_lengths_and_depend_on_distances():
    draw = np.random.default_rng(0)
    q, k = (draw.normal(size=(1, 2, 3, 16)).astype(np.float32) for _ in range(2))

    def logit(i, j):
        angles = rotary(np.array([[i, j]]), 16, 100.0)
        turned = rotate(q, angles)[0, 0], rotate(k, angles)[0, 1]
        return np.sum(np.asarray(turned[0]) * np.asarray(turned[1]), -1)

    np.testing.assert_allclose(logit(7, 3), logit(19, 15), rtol=1e-4, atol=1e-5)
    assert np.abs(logit(7, 3) - logit(7, 4)).max() > 0.1
    turned = rotate(q, rotary(np.array([[5, 900]]), 16, 100.0))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)
