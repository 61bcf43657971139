"""Next-token loss over packed rows; logits exist only for a chunk of positions at a time."""

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

    `model.unembed` is applied to at most `chunk` positions of every row at a time, and to at most half of them, and
    again in the backward pass; a chunk without weight in any row (images, prompts) is passed over. `z_loss` adds
    z_loss * log(Z)^2 per weighted token (Chowdhery et al. 2022). Returns (loss sum, {name: sum}).
    """
    targets = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
    weights = loss_weights(batch)

    def add_chunk(totals, x, target, weight):
        logits = model.unembed(x)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        cross_entropy = jnp.sum((log_z - picked) * weight)
        penalty = z_loss * jnp.sum(log_z**2 * weight)
        hits = jnp.sum((jnp.argmax(logits, axis=-1) == target) * weight)
        return {
            "loss": totals["loss"] + cross_entropy,
            "z_loss": totals["z_loss"] + penalty,
            "hits": totals["hits"] + hits,
        }

    def one_chunk(totals, chunk_inputs):
        weighted = jnp.any(chunk_inputs[-1] != 0)
        return jax.lax.cond(weighted, add_chunk, lambda totals, *_: totals, totals, *chunk_inputs), None

    zero = jnp.zeros((), jnp.float32)
    start = {"loss": zero, "z_loss": zero, "hits": zero}
    totals, _ = jax.lax.scan(jax.checkpoint(one_chunk), start, in_chunks(chunk, hidden, targets, weights))
    return totals["loss"] + totals["z_loss"], totals


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
