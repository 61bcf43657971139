"""What keeps experts evenly loaded: losses of the routers, and biases that follow the load."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vishwamai.models.config import BalanceScope, MixtureConfig
from vishwamai.models.moe import Balance, Routing

Found = Mapping[str, Routing]  # of each stack of mixture layers, by its name


def all_layers(routing: Found) -> Routing:
    """One Routing whose arrays have a first axis for all mixture layers, stack after stack."""
    rows = [
        jax.tree.map(lambda x, alone=each.tokens.ndim == 0: x[None] if alone else x, each) for each in routing.values()
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


def balance_loss(routing: Found, scope: BalanceScope) -> Float[Array, ""]:
    """E sum_e f_e P_e: f_e the choices of expert e per token, P_e its mean probability; k where all are even.

    Switch Transformers' (Fedus et al. 2021, eq. 4 to 6) with f summing to k, as Transformers has it. `scope`: of each
    layer, then the mean; or with f and P over all layers, which lets one layer make up for another.
    """
    found = all_layers(routing)
    sums = found.load, found.probability, found.tokens[:, None]
    if scope is BalanceScope.MODEL:
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0, keepdims=True), sums)
    load, probability, tokens = sums
    tokens = jnp.maximum(tokens, 1)
    share = jax.lax.stop_gradient(load) / tokens * (probability / tokens)
    return load.shape[-1] * jnp.mean(jnp.sum(share, axis=-1))


def router_losses(
    routing: Found, mixture: MixtureConfig
) -> tuple[Float[Array, ""], dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]]:
    """(loss to add to the mean loss of a token, metrics as (sum, count) pairs over the tokens of this batch).

    expert_load is the share of a layer's choices that went to each expert: even is 1 / E everywhere.

    The z-loss is the mean over tokens and layers of log(Z)^2 (ST-MoE, Zoph et al. 2022, eq. 5).
    """
    found = all_layers(routing)
    tokens, everywhere = found.tokens[0], jnp.sum(found.tokens)
    balance = balance_loss(routing, mixture.aux_loss_scope)
    z = jnp.sum(found.z) / jnp.maximum(everywhere, 1)
    choices = found.tokens * mixture.num_experts_per_tok
    return mixture.router_aux_loss_coef * balance + mixture.router_z_loss_coef * z, {
        "balance_loss": (balance * tokens, tokens),
        "router_z": (jnp.sum(found.z), everywhere),
        "router_entropy": (jnp.sum(found.entropy), everywhere),
        "dropped": (jnp.sum(found.dropped), jnp.sum(choices)),
        "expert_load": (found.load, choices[:, None]),
    }


def moved_biases(state: nnx.State, routing: Found, rate: float) -> nnx.State:
    """A state whose routers' biases are `rate` higher for experts with less than the mean load, lower for the others.

    Auxiliary-loss-free load balancing (Wang et al. 2024, arXiv 2408.15664, algorithm 1). Everything else stays.
    """

    def moved(path, variable):
        if not isinstance(variable, Balance):
            return variable
        load = routing[_stack(path)].load
        return variable.replace(variable.get_value() + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load))

    return nnx.from_flat_state([(path, moved(path, variable)) for path, variable in nnx.to_flat_state(state)])


def _stack(path: tuple) -> str:
    """The name of the stack (see models.pattern) that a parameter of a layer stands in."""
    after = path[path.index("layers") + 1]
    return "" if after == "mlp" else after
