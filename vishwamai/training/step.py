"""The train step: a pure function (state, batch) -> (state, metrics), jitted once with donated state."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vishwamai.config import ConfigError
from vishwamai.data.batch import Batch
from vishwamai.experiment import Experiment
from vishwamai.models.config import Softmax
from vishwamai.models.moe import Routing
from vishwamai.parallel.sharding import parameter_shardings, row_sharding, row_shares
from vishwamai.training.losses import loss_weights, next_token_loss
from vishwamai.training.optimizer import learning_rate, make_optimizer, partition
from vishwamai.training.routing import moved_biases, router_losses


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the frozen parameters that it reads.

    `healthy` turns false at the first non-finite gradient and then holds the state still: `step` stays at the
    number of good steps, so the batch that did it is the batch of that number, and nothing is poisoned.
    """

    step: jax.Array
    healthy: jax.Array
    trainable: nnx.State
    frozen: nnx.State
    optimizer: Any

    @property
    def parameters(self) -> nnx.State:
        return nnx.merge_state(self.trainable, self.frozen)


@dataclass(frozen=True)
class Trainer:
    """The compiled pieces of an experiment on a mesh: `initial()`, `step(state, batch)`, `gradients(state, batch)`."""

    graph: nnx.GraphDef
    mesh: Mesh
    abstract: TrainState
    shardings: TrainState
    initial: Callable[[], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    gradients: Callable[[TrainState, Batch], tuple[nnx.State, dict[str, tuple], dict[str, Routing]]]

    def from_parameters(self, parameters: nnx.State) -> TrainState:
        """A fresh state (step 0, empty optimizer) on the mesh around given parameters, which it takes over."""
        return self._start(parameters)

    _start: Callable[[nnx.State], TrainState]


def make_trainer(experiment: Experiment, build: Callable[..., nnx.Module], mesh: Mesh) -> Trainer:
    """Builds the trainer without allocating anything; `build(model_config, rngs=)` is the family's."""
    training = experiment.training
    shares = training.gradient_accumulation * row_shares(mesh)
    if training.batch_size % shares:
        raise ConfigError(
            f"training.batch_size={training.batch_size} is not a multiple of {shares}: "
            f"gradient_accumulation={training.gradient_accumulation} times {row_shares(mesh)} devices on data and fsdp"
        )

    def new_parameters() -> nnx.State:
        return nnx.state(build(experiment.model, rngs=nnx.Rngs(experiment.seed)))

    module = nnx.eval_shape(lambda: build(experiment.model, rngs=nnx.Rngs(0)))
    graph, abstract_parameters = nnx.split(module)
    mixture = module.language_model.config.mixture
    trainable, frozen = partition(abstract_parameters, training.trainable)
    optimizer = make_optimizer(experiment.optimizer, training.steps, trainable)
    schedule = learning_rate(experiment.optimizer, training.steps)

    def start(parameters: nnx.State) -> TrainState:
        trainable, frozen = partition(parameters, training.trainable)
        return TrainState(jnp.int32(0), jnp.bool_(True), trainable, frozen, optimizer.init(trainable))

    dtype = jnp.dtype(training.dtype.value)

    def loss(trainable, frozen, batch: Batch, total_weight, total_tokens):
        model = nnx.merge(graph, trainable, frozen)
        decoded = model.decoded(batch, dtype, training.remat, drops=True, softmax=training.attention_softmax)
        summed, sums = next_token_loss(model, decoded.hidden, batch, z_loss=training.z_loss, chunk=training.loss_chunk)
        mean, routers = summed / total_weight, {}
        if decoded.routing:
            added, routers = router_losses(decoded.routing, mixture)
            # Of a micro-batch, by its share of the tokens.
            mean += added * jnp.count_nonzero(batch.segment_ids) / total_tokens
        return mean, (sums, routers, decoded.routing)

    def gradients(state: TrainState, batch: Batch):
        """Mean gradients over all weighted tokens, metrics as (sum, count) pairs, and what the routers did."""
        total_weight = jnp.sum(loss_weights(batch))
        total_weight = jnp.where(total_weight == 0, 1.0, total_weight)  # a batch that trains nothing has loss 0
        totals = total_weight, jnp.maximum(jnp.count_nonzero(batch.segment_ids), 1)
        value_and_gradient = jax.value_and_grad(loss, has_aux=True)

        def one(micro_batch):
            (_, found), grads = value_and_gradient(state.trainable, state.frozen, micro_batch, *totals)
            return grads, found

        if training.gradient_accumulation == 1:
            grads, found = one(batch)
        else:
            micro_batches = jax.tree.map(lambda x: split_rows(x, training.gradient_accumulation), batch)
            shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro_batches))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            add = lambda total, micro_batch: (jax.tree.map(jnp.add, total, one(micro_batch)), None)  # noqa: E731
            (grads, found), _ = jax.lax.scan(add, zeros, micro_batches)
        sums, routers, routing = found
        names = {"loss": "loss", "z_loss": "z_loss", "accuracy": "hits"}
        return grads, {name: (sums[of], total_weight) for name, of in names.items()} | routers, routing

    def step(state: TrainState, batch: Batch):
        grads, metrics, routing = gradients(state, batch)
        norm = optax.tree.norm(grads)
        healthy = state.healthy & jnp.isfinite(norm)
        updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
        frozen = moved_biases(state.frozen, routing, mixture.router_bias_update_rate) if routing else state.frozen
        moved = (optax.apply_updates(state.trainable, updates), frozen, moments)
        before = (state.trainable, state.frozen, state.optimizer)
        keep = lambda new, old: old if new is old else jnp.where(healthy, new, old)  # noqa: E731
        kept = jax.tree.map(keep, moved, before)
        metrics |= {"grad_norm": norm, "learning_rate": schedule(state.step), "healthy": healthy}
        if training.attention_softmax is Softmax.BOUNDED:  # above 50 the kernel keeps a running maximum
            decoder = nnx.merge(graph, state.trainable, state.frozen).language_model
            metrics["max_logit"] = decoder.max_logit(dtype)
        return TrainState(state.step + healthy, healthy, *kept), metrics

    abstract = jax.eval_shape(lambda: start(new_parameters()))
    shardings = state_shardings(abstract, mesh)
    rows, whole = row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    in_mesh = lambda function, **options: _with_mesh(mesh, jax.jit(function, **options))  # noqa: E731
    return Trainer(
        graph=graph,
        mesh=mesh,
        abstract=abstract,
        shardings=shardings,
        initial=in_mesh(lambda: start(new_parameters()), out_shardings=shardings),
        step=in_mesh(step, in_shardings=(shardings, rows), out_shardings=(shardings, whole), donate_argnums=0),
        gradients=in_mesh(gradients, in_shardings=(shardings, rows)),
        _start=in_mesh(start, out_shardings=shardings, donate_argnums=0),
    )


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """B ... -> parts B/parts ...; rows are dealt out so that every device keeps its own rows."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def state_shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a whole state: moments lie as their parameters do, scalars are everywhere."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(node):
        return parameter_shardings(node, mesh) if isinstance(node, nnx.State) else whole

    return jax.tree.map(place, abstract, is_leaf=lambda node: isinstance(node, nnx.State))


def _with_mesh(mesh: Mesh, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args):
        with jax.set_mesh(mesh):
            return function(*args)

    return call
