"""Next-token loss over packed rows; logits exist only for a chunk of positions at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from vishwamai.data.batch import Batch


def loss_weights(batch: Batch) -> Float[Array, "B T"]:
    """Weight of each prediction made AT a position (of the token after it); the last position predicts nothing."""
    following = jnp.pad(batch.loss_weights[:, 1:], ((0, 0), (0, 1)))
    same_example = jnp.pad(batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1], ((0, 0), (0, 1)))
    return jnp.where(same_example & (batch.segment_ids > 0), following, 0.0)


def next_token_loss(
    model: nnx.Module, hidden: Float[Array, "B T D"], batch: Batch, *, z_loss: float = 0.0, chunk: int = 512
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Summed weighted cross-entropy (not divided: the caller knows the weight of the whole batch) and metric sums.

    `model.unembed` is applied to at most `chunk` positions of every row at a time, and to at most half of them; a
    chunk without weight in any row (images, prompts) is passed over. `z_loss` adds z_loss * log(Z)^2 per weighted
    token (Chowdhery et al. 2022). Returns (loss sum, {name: sum}), of which the first has gradients.
    """
    targets = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
    x, *others = in_chunks(chunk, hidden, targets, loss_weights(batch))
    # What unembed reads of the model becomes an argument, to take a gradient by.
    unembed, parameters = jax.closure_convert(model.unembed, x[0])

    def of_chunk(x, parameters, target, weight):
        logits = unembed(x, *parameters)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        sums = {
            "loss": jnp.sum((log_z - picked) * weight),
            "z_loss": z_loss * jnp.sum(log_z**2 * weight),
            "hits": jnp.sum((jnp.argmax(logits, axis=-1) == target) * weight),
        }
        return sums["loss"] + sums["z_loss"], sums

    return _summed(of_chunk, x, parameters, *others)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(of_chunk, x, parameters, targets, weights):
    """The sums of what `of_chunk(x, parameters, target, weight)` gives for each chunk."""
    return _over_chunks(lambda x, *others: (of_chunk(x, parameters, *others), ()), x, targets, weights)[0]


def _forward(of_chunk, x, parameters, targets, weights):
    # Gradients are made beside the loss, while the logits are there: a backward pass would have to make them again.
    trained = [parameter.perturbed for parameter in parameters]

    def with_gradients(x, *others):
        def loss(x, moving):
            moving = iter(moving)
            every = [next(moving) if own else p.value for own, p in zip(trained, parameters, strict=True)]
            return of_chunk(x, every, *others)

        moving = [p.value for own, p in zip(trained, parameters, strict=True) if own]
        (total, sums), (d_x, d_moving) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, moving)
        return ((total, sums), d_moving), d_x

    (sums, d_moving), d_x = _over_chunks(with_gradients, x.value, targets.value, weights.value)
    d_moving = iter(d_moving)
    return sums, (d_x, [next(d_moving) if own else None for own in trained])


def _backward(of_chunk, gradients, cotangents):
    scale, _ = cotangents
    d_x, d_parameters = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), gradients)
    return d_x, d_parameters, None, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_chunks(function, *chunks):
    """`function(*chunk)` is (sums, output): (sums over all chunks, outputs side by side).

    Of a chunk whose weights (the last of its arrays) are all 0, all of it is 0.
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *(x[0] for x in chunks)))

    def one(sums, chunk):
        added, output = jax.lax.cond(jnp.any(chunk[-1] != 0), function, lambda *_: zeros, *chunk)
        return jax.tree.map(jnp.add, sums, added), output

    return jax.lax.scan(one, zeros[0], chunks)


def in_chunks(chunk: int, *arrays: Shaped[Array, "B T ..."]) -> tuple[Shaped[Array, "C B t ..."], ...]:
    """Each array cut into C pieces of at most `chunk` positions, the last one padded with zeros, for `lax.scan`.

    The pieces are as even as they can be, which pads least; at least two, so that no logits are those of whole rows.
    """
    length = arrays[0].shape[1]
    chunk = -(-length // max(2, -(-length // chunk)))

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return tuple(map(cut, arrays))
