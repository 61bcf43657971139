"""The feed-forward block of a dense layer."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from vishwamai.models.config import Activation, TextConfig
from vishwamai.models.layers import Linear

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    Activation.SILU: jax.nn.silu,
    Activation.GELU: lambda x: jax.nn.gelu(x, approximate=True),
}


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)): SwiGLU or GeGLU (Shazeer 2020)."""

    def __init__(self, config: TextConfig, inner: int, *, rngs: nnx.Rngs):
        width, init = config.hidden_size, initializers.normal(config.initializer_range)
        options = dict(rngs=rngs, init=init, bias=config.mlp_bias)
        self.gate_proj = Linear(width, inner, ("embed", "mlp"), **options)
        self.up_proj = Linear(width, inner, ("embed", "mlp"), **options)
        self.down_proj = Linear(inner, width, ("mlp", "embed"), **options)
        self.act = config.hidden_act

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down_proj(ACTIVATIONS[self.act](self.gate_proj(x)) * self.up_proj(x))
