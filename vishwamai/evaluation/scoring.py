"""How likely a model finds given tokens: rows of unequal lengths in few shapes, logits only in chunks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vishwamai.checkpoint import CheckpointError
from vishwamai.data.batch import Batch, text_batch
from vishwamai.generation.prompts import bucket
from vishwamai.pretrained import VishwamAI, checked_ids
from vishwamai.training.losses import in_chunks

CHUNK = 128  # positions of every row whose logits exist at the same time
NOT_SCORED = -1  # a target that nobody asks about


@dataclass(frozen=True)
class Row:
    """Tokens of which the last `scored` are asked about, each given all that stand before it.

    Raises ValueError where none would stand before the first of them.
    """

    tokens: Sequence[int] | Int[np.ndarray, " T"]
    scored: int

    def __post_init__(self):
        if not 0 <= self.scored < max(len(self.tokens), 1):
            raise ValueError(
                f"{self.scored} of {len(self.tokens)} tokens are to be scored: at least one must stand before them"
            )


class Score(NamedTuple):
    """What a row's scored tokens come to."""

    log_probability: float  # the sum of theirs, natural logarithm; 0 where none is scored
    is_greedy: bool  # each of them is the most likely one; of equally likely ones, the one of the lowest id


@partial(jax.jit, static_argnums=0, static_argnames=("dtype", "chunk"))
def token_log_probabilities(
    graph: nnx.GraphDef,
    parameters: nnx.State,
    batch: Batch,
    targets: Int[Array, "B T"],
    *,
    dtype=jnp.float32,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(log-probabilities of `targets[b, t]` after `batch.tokens[b, :t + 1]`, whether it is the most likely token).

    Where the target is `NOT_SCORED` these are 0 and True. In float32 whatever the compute dtype; logits exist for at
    most `chunk` positions of every row at a time, and a chunk without targets is passed over.
    """
    model = nnx.merge(graph, parameters)
    hidden = model.hidden_states(batch, dtype)

    def look_up(x, target, scored):
        logits = model.unembed(x)
        picked = jnp.take_along_axis(logits, jnp.where(scored, target, 0)[..., None], axis=-1)[..., 0]
        log_probability = picked - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(scored, log_probability, 0.0), (jnp.argmax(logits, axis=-1) == target) | ~scored

    def pass_over(_, target, scored):
        return jnp.zeros(target.shape, jnp.float32), jnp.ones(target.shape, bool)

    def one_chunk(_, chunk_inputs):
        return None, jax.lax.cond(jnp.any(chunk_inputs[-1]), look_up, pass_over, *chunk_inputs)

    _, found = jax.lax.scan(one_chunk, None, in_chunks(chunk, hidden, targets, targets != NOT_SCORED))
    rows, length = targets.shape
    log_probabilities, most_likely = (jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length] for x in found)
    return log_probabilities, most_likely


def score(
    model: VishwamAI,
    rows: Sequence[Row],
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """The score of each row; which rows it shares a batch with changes nothing.

    Long rows come first; a length is rounded up (`generation.prompts.bucket`) and the number of rows to a power of
    two, so that few shapes are compiled. `on_progress` is called with (rows done, rows in all).

    Raises:
        ValueError: token ids outside the vocabulary, or a row longer than the context and the token behind it.
        CheckpointError: the model gives NaN.
    """
    context = model.config.max_position_embeddings
    longest = max((len(row.tokens) for row in rows), default=0)
    if longest > context + 1:  # the last token is only looked for
        raise ValueError(f"a row of {longest} tokens is to be scored, the context holds {context} and the one behind")
    scores = [Score(0.0, True)] * len(rows)
    order = sorted((at for at, row in enumerate(rows) if row.scored), key=lambda at: -len(rows[at].tokens))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for at, found in zip(chosen, _score_batch(model, [rows[at] for at in chosen], batch_size), strict=True):
            scores[at] = found
        on_progress(start + len(chosen), len(order))
    return scores


def _score_batch(model: VishwamAI, rows: Sequence[Row], batch_size: int) -> list[Score]:
    lengths = [len(row.tokens) - 1 for row in rows]
    shape = min(batch_size, 1 << (len(rows) - 1).bit_length()), bucket(max(lengths))
    tokens, there = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    targets = np.full(shape, NOT_SCORED, np.int32)
    for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids = checked_ids([row.tokens], model.config.vocab_size)[0]
        tokens[at, :length], there[at, :length] = ids[:-1], 1
        targets[at, length - row.scored : length] = ids[length + 1 - row.scored :]
    batch = text_batch(tokens, there)
    found = token_log_probabilities(model.graph, model.parameters, batch, targets, dtype=model.dtype)
    # Summed in float64: a document has more tokens than float32 has digits for.
    sums, greedy = np.asarray(found[0], np.float64).sum(axis=1), np.asarray(found[1]).all(axis=1)
    if not np.isfinite(sums[: len(rows)]).all():
        raise CheckpointError(
            f"the model in {model.folder} gives log-probabilities that are no numbers: look at its weights"
        )
    return [Score(float(sums[at]), bool(greedy[at])) for at in range(len(rows))]
