"""The small layers that every model is made of. A parameter is declared once: shape, logical axes, how it starts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

Init = initializers.Initializer
Axes = tuple[str | None, ...]


class Carried(nnx.Variable):
    """A weight that is kept for export but not run, not trained and not in the optimizer."""


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, init: Init, kind=nnx.Param) -> nnx.Variable:
    """A float32 parameter whose dimensions carry the logical names `axes` (see parallel.sharding)."""
    if len(axes) != len(shape):
        raise ValueError(f"shape {shape} has {len(shape)} dimensions, axes {axes} name {len(axes)}")
    return kind(init(rngs.params(), shape, jnp.float32), axes=axes)


def few_rows(x: Float[Array, "R I"], kernel: Float[Array, "O I"]) -> Float[Array, "R O"]:
    """x @ kernel.T in float32 or wider, as XLA's CPU compiler does it best where R is small.

    It is then the time to read the kernel that counts: `kernel @ x.T` takes half of that of `x @ kernel.T`, and two
    thirds of that of a product with the transposed kernel. The barrier keeps XLA from turning it round again.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.optimization_barrier(jnp.matmul(kernel, x.T, preferred_element_type=wide)).T


class Linear(nnx.Module):
    """x @ kernel + bias, computed in x's dtype; kernel is [in, out] (but see `unstack`)."""

    turned = False

    def __init__(
        self, features_in: int, features_out: int, axes: Axes, *, rngs: nnx.Rngs, init: Init, bias: bool = False,
        kind=nnx.Param,
    ):  # fmt: skip
        self.kernel = parameter(rngs, (features_in, features_out), axes, init, kind)
        if bias:
            self.bias = parameter(rngs, (features_out,), axes[1:], initializers.zeros, kind)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        kernel = self.kernel[...].astype(x.dtype)
        # As one matrix: XLA on CPU forms the kernel's gradient of a "B T I" product three times as slowly.
        rows = x.reshape(-1, x.shape[-1])
        y = few_rows(rows, kernel).astype(x.dtype) if self.turned else rows @ kernel
        y = y.reshape(*x.shape[:-1], -1)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class Embedding(nnx.Module):
    """A table of vectors, [rows, D]."""

    def __init__(self, rows: int, features: int, axes: Axes, *, rngs: nnx.Rngs, init: Init):
        self.embedding = parameter(rngs, (rows, features), axes, init)

    def __call__(self, index: Int[Array, "..."], dtype: jnp.dtype) -> Float[Array, "... D"]:
        return jnp.take(self.embedding[...].astype(dtype), index, axis=0)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang & Sennrich 2019), statistics in float32.

    `zero_centered`: times 1 + scale, a product in float32 too (as Gemma's models are trained).
    """

    def __init__(self, features: int, eps: float, *, rngs: nnx.Rngs, axis: str = "norm", zero_centered: bool = False):
        start = initializers.zeros if zero_centered else initializers.ones
        self.scale = parameter(rngs, (features,), (axis,), start)
        self.eps = eps
        self.zero_centered = zero_centered

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.zero_centered:
            return (wide * self.gain(x.dtype)).astype(x.dtype)
        return wide.astype(x.dtype) * self.gain(x.dtype)

    def gain(self, dtype: jnp.dtype) -> Float[Array, " D"]:
        """What x / rms(x) of that dtype is multiplied by."""
        return 1 + self.scale[...].astype(jnp.float32) if self.zero_centered else self.scale[...].astype(dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias (Ba et al. 2016), statistics in float32."""

    def __init__(self, features: int, eps: float, *, rngs: nnx.Rngs, kind=nnx.Param):
        self.scale = parameter(rngs, (features,), ("norm",), initializers.ones, kind)
        self.bias = parameter(rngs, (features,), ("norm",), initializers.zeros, kind)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` copies of a module with every parameter stacked on a new first axis, each copy with its own seed."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(layers))


def scan(
    layers: nnx.Module, body: Callable, carry, inputs=None, checkpoint: Callable | None = None, layers_a_turn: int = 1
):
    """Runs `body(layer, carry, input) -> (carry, output)` over stacked layers; compile time does not grow with depth.

    `checkpoint` wraps the body (jax.checkpoint with a policy). `layers` may be a list of `layers_a_turn` stacks, whose
    layers the body takes together. Returns (carry, stacked outputs).
    """
    graph, state = nnx.split(layers)

    def step(carry, scanned):
        layer_state, given = scanned
        return body(nnx.merge(graph, layer_state), carry, given)

    # A loop on CPU copies each layer's weights and residuals in and out: a few layers a turn train 1.2 times as fast.
    unroll = max(1, 4 // layers_a_turn) if jax.default_backend() == "cpu" else 1
    return jax.lax.scan(checkpoint(step) if checkpoint else step, carry, (state, inputs), unroll=unroll)


def unstack(layers: nnx.Module, stacked: bool = True) -> list[nnx.Module]:
    """The layers of a stack one by one, to decode with: a slice of the stack would be copied in each turn of a loop.

    On the CPU their linear layers' kernels are turned to [out, in], as `few_rows` wants them.
    """
    graph, state = nnx.split(layers)
    depth = jax.tree.leaves(state)[0].shape[0]
    each = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(depth)] if stacked else [state]
    unstacked = [nnx.merge(graph, state) for state in each]
    if jax.default_backend() == "cpu":
        for _, module in nnx.iter_graph(unstacked):
            if isinstance(module, Linear):
                module.kernel.set_value(module.kernel[...].T)
                module.turned = True
    return unstacked
