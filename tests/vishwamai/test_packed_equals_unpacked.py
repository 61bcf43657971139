"""Examples that share a row do not see each other: loss and gradients are those of each example in a row of its own."""

import jax
import numpy as np
import pytest
from cases import quick_and_slow
from flax import nnx

from vishwamai.data.packing import Capacity, Example, collate, first_fit
from vishwamai.models.config import TextConfig
from vishwamai.models.transformer import Transformer
from vishwamai.training.losses import next_token_loss
from vishwamai.training.routing import router_losses

SIZES = dict(
    vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, router_z_loss_coef=0.01)
LOCAL_AND_GLOBAL = dict(
    sliding_window=4, layer_types=["sliding_attention", "full_attention"], rope_local_base_freq=100.0
)
KINDS = {
    "dense": {},
    "a window": dict(sliding_window=4),
    "local and global": dict(**LOCAL_AND_GLOBAL, sandwich_norms=True, zero_centered_norms=True, scale_embeddings=True),
    "mixture": dict(mixture=MIXTURE | dict(aux_loss_scope="model")),
    "mixture, local and global": dict(**LOCAL_AND_GLOBAL, mixture=MIXTURE | dict(decoder_sparse_step=2)),
}
LENGTHS = (3, 11, 1, 7, 19, 2, 24, 13)


def examples():
    draw = np.random.default_rng(0)
    for length in LENGTHS:
        weights = draw.choice([0.0, 1.0, 0.5], length).astype(np.float32)
        yield Example(draw.integers(0, 50, length).astype(np.int32), weights)


@pytest.mark.parametrize("kind", quick_and_slow(KINDS, ["dense", "mixture"]))
def test_loss_and_gradients(kind):
    config = TextConfig(**SIZES, **kind)
    graph, parameters = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    capacity, given = Capacity(24), list(examples())
    row_of = first_fit(np.array([example.size for example in given]), capacity)
    packed = [[given[i] for i in np.flatnonzero(row_of == row)] for row in range(row_of.max() + 1)]
    assert len(packed) < len(given) and max(map(len, packed)) > 2

    @jax.jit
    def total(parameters, batch):
        model = nnx.merge(graph, parameters)
        decoded = model.decoded(batch)
        summed = next_token_loss(model, decoded.hidden, batch, chunk=8)[0]
        return summed + (100 * router_losses(decoded.routing, config.mixture)[0] if decoded.routing else 0)

    together, apart = (
        jax.value_and_grad(total)(parameters, collate(rows, capacity)) for rows in (packed, [[one] for one in given])
    )
    np.testing.assert_allclose(together[0], apart[0], rtol=1e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(apart[1]))
    for found, expected in zip(*(jax.tree.leaves(each[1]) for each in (together, apart)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * largest)
