"""Mixture of experts: a router sends each token to a few of many feed-forward blocks (Shazeer et al. 2017)."""

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kernels import grouped_matmul, route
from kernels.router import Routes
from vishwamai.models.config import Activation, TextConfig
from vishwamai.models.layers import Linear, parameter
from vishwamai.models.mlp import ACTIVATIONS, GatedMLP
from vishwamai.parallel import sharding

Matrices = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]  # gate, up, down


class Balance(nnx.Variable):
    """A router's bias: moved by the load of the experts after each step, never by a gradient (see training.routing)."""


class Routing(NamedTuple):
    """What a router did with the tokens of a batch, padding left out: sums, so that parts of a batch add up."""

    load: Float[Array, " E"]  # choices of each expert
    probability: Float[Array, " E"]  # scores of each expert, a token's sum being 1
    z: Float[Array, ""]  # squared log-sum-exp of the logits
    entropy: Float[Array, ""]  # of those scores, in nats
    dropped: Float[Array, ""]  # choices that found no room
    tokens: Float[Array, ""]


class Experts(nnx.Module):
    """E gated feed-forward blocks, each parameter one array."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        experts, inner = config.mixture.num_experts, config.mixture.moe_intermediate_size
        width, init = config.hidden_size, initializers.normal(config.initializer_range)
        self.gate_proj = parameter(rngs, (experts, width, inner), ("expert", "embed", "mlp"), init)
        self.up_proj = parameter(rngs, (experts, width, inner), ("expert", "embed", "mlp"), init)
        self.down_proj = parameter(rngs, (experts, inner, width), ("expert", "mlp", "embed"), init)
        self.act: Activation = config.hidden_act

    def matrices(self, dtype: jnp.dtype) -> Matrices:
        """(gate, up, down) to compute with."""
        return tuple(x[...].astype(dtype) for x in (self.gate_proj, self.up_proj, self.down_proj))


class MixtureOfExperts(nnx.Module):
    """The sum of the chosen experts' outputs by their weights, and of the shared experts' that see every token."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        mixture, init = config.mixture, initializers.normal(config.initializer_range)
        self.gate = Linear(config.hidden_size, mixture.num_experts, ("embed", None), rngs=rngs, init=init)
        self.experts = Experts(config, rngs=rngs)
        if mixture.biased:
            self.e_score_correction_bias = parameter(
                rngs, (mixture.num_experts,), (None,), initializers.zeros, kind=Balance
            )
        if mixture.n_shared_experts:
            self.shared_experts = GatedMLP(config, mixture.n_shared_experts * mixture.moe_intermediate_size, rngs=rngs)
        self.mixture = mixture

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], drops: bool = False
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The output, and what the router did; what is not `real` is sent to no expert and counts nowhere.

        drops: whether experts are bounded by the capacity, as in training. What is read from a trained model must not
        depend on how long its rows are.
        """
        rows, live = x.reshape(-1, x.shape[-1]), real.reshape(-1)
        # In float32, products too: a choice must not depend on rounding (Fedus et al. 2021, section 2.4).
        with jax.default_matmul_precision("float32"):
            logits = self.gate(rows.astype(jnp.float32))
        routes = self.routes(logits, live)
        capacity = self.mixture.capacity(x.shape[1]) if drops else None
        if capacity is None:
            out, dropped = self._dropless(rows, routes.experts, routes.weights), jnp.float32(0)
        else:
            grouped = (a.reshape(*x.shape[:2], -1) for a in (x, routes.experts, routes.weights))
            out, dropped = bounded(*grouped, self.experts.matrices(x.dtype), self.experts.act, capacity)
            out = out.reshape(rows.shape)
        if hasattr(self, "shared_experts"):
            out = out + self.shared_experts(rows)
        return out.reshape(x.shape), Routing(
            load=routes.counts.astype(jnp.float32),
            probability=routes.probability,
            z=routes.z,
            entropy=routes.entropy,
            dropped=dropped,
            tokens=jnp.sum(live, dtype=jnp.float32),
        )

    def _dropless(self, rows: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"]):
        matrices = self.experts.matrices(rows.dtype)
        run = partial(dropless, act=self.experts.act)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return run(rows, experts, weights, matrices)
        # Each device sorts its own rows: a sort of all of them would bring them all to every device.
        by_row = sharding.spec(("rows",), rows.shape[:1], mesh)
        held = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        lie = tuple(sharding.spec(each.axes, x.shape, mesh) for each, x in zip(held, matrices, strict=True))
        split = lie[0][2]

        def local(rows, experts, weights, matrices):
            # Gathered here, and not by XLA ahead of it: each device then gets the sum of its part of their gradients
            # (reduce-scatter), where it would get the whole sum to take its part from.
            matrices = tuple(_gathered_but(split, *each) for each in zip(matrices, lie, strict=True))
            out = run(rows, experts, weights, matrices)
            return out if split is None else jax.lax.psum(out, split)

        local = jax.checkpoint(local, policy=_whole_matrices_again, prevent_cse=False)
        specs = by_row, by_row, by_row, lie
        return jax.shard_map(local, in_specs=specs, out_specs=by_row, check_vma=False)(rows, experts, weights, matrices)

    def routes(self, logits: Float[Array, "T E"], live: Bool[Array, " T"] | None = None) -> Routes:
        bias = self.e_score_correction_bias[...] if hasattr(self, "e_score_correction_bias") else None
        mixture = self.mixture
        return route(
            logits,
            mixture.num_experts_per_tok,
            scoring=mixture.scoring_func.value,
            renormalise=mixture.norm_topk_prob,
            bias=bias,
            scale=mixture.routed_scaling_factor,
            groups=mixture.n_group,
            top_groups=mixture.topk_group,
            live=live,
        )


def _whole_matrices_again(primitive, *_, **__) -> bool:
    """Whether the backward keeps a value: all but whole matrices, which would else be kept of every layer."""
    return primitive.name != "all_gather"


def _gathered_but(split: str | None, x: Float[Array, "E ..."], lies: PartitionSpec) -> Float[Array, "E ..."]:
    """A device's part of x, which lies as `lies` says, with every dimension whole but the one that `split` splits."""
    for dimension, axes in enumerate(lies):
        if axes is not None and axes != split:
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x


def dropless(
    rows: Float[Array, "T D"],
    experts: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    matrices: Matrices,
    act: Activation,
) -> Float[Array, "T D"]:
    """Every choice is honoured: sort by expert, grouped products, unsort (Gale et al. 2022).

    A choice of expert E, which there is not, gives 0.
    """
    gate, up, down = matrices
    order = jnp.argsort(experts.T.reshape(-1), stable=True)  # all first choices, then all second ones, ...
    token, place = order % len(rows), jnp.argsort(order).reshape(experts.T.shape)  # place: of each choice when sorted
    sizes = jnp.sum(jax.nn.one_hot(experts, len(gate), dtype=jnp.int32), axis=(0, 1))
    inner = grouped_matmul(repeated(rows, token, place), up, sizes, gate=gate, activation=ACTIVATIONS[act])
    # Weighted here and not behind the last product: those rows are wider, and would be kept for the backward pass.
    inner = (inner * permuted(weights.T.reshape(-1), order, place.reshape(-1))[:, None]).astype(inner.dtype)
    return summed(grouped_matmul(inner, down, sizes), token, place)


def _gathered(x, index, _):
    return x[index]


def _summed(x, _, place):
    # One gather for each choice, and what they give added as a whole: on TPUs, a sum over an axis takes twice as long.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return reduce(add, (x[each].astype(wide) for each in place)).astype(x.dtype)


def _transposed(f: Callable, gradient: Callable) -> Callable:
    """`f(x, index, other)`, whose gradient is `gradient(dy, index, other)`: gathered too, where XLA would scatter."""
    g = jax.custom_vjp(f)
    g.defvjp(lambda x, *index: (f(x, *index), index), lambda index, dy: (gradient(dy, *index), None, None))
    return g


# x[token], each token k times; the sum of each token's k rows, which are x[place]: each is the other's gradient.
repeated, summed = _transposed(_gathered, _summed), _transposed(_summed, _gathered)
# x[index] of a permutation.
permuted = _transposed(_gathered, lambda dy, index, inverse: dy[inverse])


def bounded(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    matrices: Matrices,
    act: Activation,
    capacity: int,
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """Each expert takes `capacity` tokens of a row at most (GShard, Lepikhin et al. 2020): (output, choices dropped).

    First choices go before second ones, early tokens before late ones. Shapes are static and nothing leaves its row.
    """
    (rows, length, k), (gate, up, down) = experts.shape, matrices
    choice = jax.nn.one_hot(experts.swapaxes(1, 2).reshape(rows, -1), len(gate), dtype=jnp.int32)  # B kT E
    before = jnp.sum(jnp.cumsum(choice, axis=1) * choice, axis=-1) - 1  # of the same expert; -1: goes nowhere
    taken = (before >= 0) & (before < capacity)
    slot = jnp.where(taken, before, capacity).reshape(rows, k, length).swapaxes(1, 2)
    taken = taken.reshape(rows, k, length).swapaxes(1, 2)
    real = experts < len(gate)
    expert = jnp.where(real, experts, 0)

    def one_row(x, expert, slot, weight):
        token = jnp.broadcast_to(jnp.arange(length)[:, None], slot.shape)
        # What has no room is written behind the last slot, which is cut off.
        room = jnp.zeros((len(gate), capacity + 1, x.shape[-1]), x.dtype).at[expert, slot].set(x[token])[:, :capacity]
        inner = ACTIVATIONS[act](jnp.einsum("ecd,edf->ecf", room, gate)) * jnp.einsum("ecd,edf->ecf", room, up)
        out = jnp.einsum("ecf,efd->ecd", inner, down)
        out = jnp.pad(out, ((0, 0), (0, 1), (0, 0)))[expert, slot]
        return jnp.einsum("tkd,tk->td", out, weight)

    weights = jnp.where(taken, weights, 0).astype(x.dtype)
    return jax.vmap(one_row)(x, expert, slot, weights), jnp.sum(real & ~taken).astype(jnp.float32)


def dense(
    rows: Float[Array, "T D"],
    experts: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    matrices: Matrices,
    act: Activation,
) -> Float[Array, "T D"]:
    """What `dropless` computes, by sending every token to every expert: the reference for tests."""
    gate, up, down = matrices
    mix = jnp.einsum("tke,tk->te", jax.nn.one_hot(experts, len(gate)), weights)
    inner = ACTIVATIONS[act](jnp.einsum("td,edf->tef", rows, gate)) * jnp.einsum("td,edf->tef", rows, up)
    return jnp.einsum("tef,efd,te->td", inner, down, mix)
