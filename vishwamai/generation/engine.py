"""Prefill, then a compiled loop that decodes until every row has ended. The same for every model.

A model brings `embed(batch)`, `mask(batch)` and `language_model`: images matter to the prompt's embeddings only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Int

from vishwamai.data.batch import Batch
from vishwamai.generation.prompts import bucket, extended_left
from vishwamai.generation.sampling import GREEDY, Sampling, Settings, sample
from vishwamai.models.attention import KVCache
from vishwamai.models.layers import unstack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Where a batch stands: between two rounds of the loop, or between two calls of it."""

    cache: KVCache
    token: Int[Array, " B"]  # the latest of each row: written, but not yet in the cache
    position: Int[Array, " B"]
    segment_id: Int[Array, " B"]
    ended: Bool[Array, " B"]
    tokens: Int[Array, "B M"]  # what was generated, with room for more
    count: Int[Array, ""]  # how many of `tokens` are there


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ending:
    """The ids after which a row is over, and the id it is then filled with."""

    end_ids: Int[Array, " E"]
    pad_id: Int[Array, ""]


def generate(
    graph: nnx.GraphDef,
    parameters: nnx.State,
    batch: Batch,
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling = GREEDY,
    dtype: Any = jnp.float32,
) -> Int[np.ndarray, "B M"]:
    """The tokens that follow each row, M = max_new_tokens.

    A row ends with the first of `end_ids` that it produces; `pad_id` stands behind it. Each pair of prompt length and
    max_new_tokens compiles once, both rounded up (`prompts.bucket`).

    Args:
        graph, parameters: a model in the two parts of `flax.nnx.split`.
        batch: one prompt per row, all ending in the last column (`prompts.left_padded`).
        dtype: of the computation and the cache.

    Raises:
        ValueError: an empty prompt, padding at its end, or more tokens than the model's context holds.
    """
    config = nnx.merge(graph, parameters).language_model.config
    _check(batch, max_new_tokens, config.max_position_embeddings)
    settings = sampling.settings(batch.rows, config.vocab_size)
    ending = Ending(jnp.asarray(end_ids, jnp.int32), jnp.int32(pad_id))
    batch = extended_left(batch, bucket(batch.tokens.shape[1]))
    layers, state = _start(graph, bucket(max_new_tokens), dtype, parameters, batch, settings, ending)
    state = _continue(graph, dtype, parameters, layers, state, jnp.int32(max_new_tokens), settings, ending)
    return np.asarray(state.tokens)[:, :max_new_tokens]


def _check(batch: Batch, max_new_tokens: int, context: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    for row in np.flatnonzero(np.asarray(batch.segment_ids)[:, -1] == 0):
        raise ValueError(f"row {row} is empty or padded on the right: prompts end in the last column")
    longest = int(np.max(np.asarray(batch.positions)[:, -1])) + 1
    if longest + max_new_tokens > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, the context holds "
            f"{context}: shorten the prompt or lower max_new_tokens to {max(context - longest, 0)}"
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _start(graph, room: int, dtype, parameters: nnx.State, batch: Batch, settings: Settings, ending: Ending):
    """Runs the prompts and draws each row's first token: (the layers one by one, Decoding)."""
    model = nnx.merge(graph, parameters)
    segment_id = batch.segment_ids[:, -1]
    slots = jnp.concatenate([batch.segment_ids, jnp.repeat(segment_id[:, None], room, axis=1)], axis=1)
    decoder = model.language_model
    x, cache = decoder.prefill(model.embed(batch, dtype), batch.positions, model.mask(batch), slots)
    token = sample(decoder.unembed(x[:, -1]), settings, jnp.int32(0))
    state = Decoding(
        cache=cache,
        token=token,
        position=batch.positions[:, -1] + 1,
        segment_id=segment_id,
        ended=jnp.isin(token, ending.end_ids),
        tokens=jnp.full((batch.rows, room), ending.pad_id).at[:, 0].set(token),
        count=jnp.int32(1),
    )
    return unstack(decoder.layers), state


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _continue(graph, dtype, parameters, layers, state: Decoding, limit, settings: Settings, ending: Ending) -> Decoding:
    """Decodes until `limit` tokens are there or every row has ended."""
    decoder = nnx.merge(graph, parameters).language_model

    def one_more(state: Decoding) -> Decoding:
        x = decoder.embed_tokens(state.token[:, None], dtype)
        mask = state.cache.mask(state.segment_id[:, None])
        x, cache = decoder.decoder(x, state.position[:, None], mask, state.cache, layers=layers)
        token = sample(decoder.unembed(x[:, 0]), settings, state.count)
        token = jnp.where(state.ended, ending.pad_id, token)
        return Decoding(
            cache=cache,
            token=token,
            position=state.position + 1,
            segment_id=state.segment_id,
            ended=state.ended | jnp.isin(token, ending.end_ids),
            tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.count)),
            count=state.count + 1,
        )

    return lax.while_loop(lambda state: (state.count < limit) & ~jnp.all(state.ended), one_more, state)
