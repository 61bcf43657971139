"""Prefill, then a compiled loop that decodes until every row has ended. The same for every model.

A model brings `embed(batch)`, `mask(batch)` and `language_model`: images matter to the prompt's embeddings only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from vishwamai.models.cache import KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Where a batch stands: between two rounds of the loop, or between two calls of it."""

    cache: KVCache
    token: Int[Array, " B"]  # the latest of each row: written, but not yet in the cache
    position: Int[Array, " B"]
    segment_id: Int[Array, " B"]
    ended: Bool[Array, " B"]
    length: Int[Array, " B"]  # how many tokens each row has, its end included
    tokens: Int[Array, "B M"]  # what was generated, with room for more
    count: Int[Array, ""]  # how many of `tokens` are there
    held: Bool[Array, "B V"] | None  # the tokens of each row's prompt and answer, where a penalty asks for them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ending:
    """The ids after which a row is over, and the id it is then filled with."""

    end_ids: Int[Array, " E"]
    pad_id: Int[Array, ""]


def generate(graph: nnx.GraphDef, parameters: nnx.State, batch: Batch, **options: Any) -> Int[np.ndarray, "B M"]:
    """The tokens that follow each row, M = max_new_tokens; arguments and errors as `Generation`."""
    generation = Generation(graph, parameters, batch, **options)
    generation.advance(generation.max_new_tokens)
    return np.asarray(generation.state.tokens)[:, : generation.max_new_tokens]


class Generation:
    """A batch that is being continued: its prompts have been run and each row has its first token.

    A row ends with the first of `end_ids` that it produces; `pad_id` stands behind it. Each pair of prompt length and
    max_new_tokens compiles once, both rounded up (`prompts.bucket`).

    Args:
        graph, parameters: a model in the two parts of `flax.nnx.split`.
        batch: one prompt per row, all ending in the last column (`prompts.left_padded`).
        samples: how many rows continue each prompt; they stand together and share its prefill.
        dtype: of the computation and the cache.

    Raises:
        ValueError: an empty prompt, padding at its end, or more tokens than the model's context holds.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        parameters: nnx.State,
        batch: Batch,
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        pad_id: int,
        sampling: Sampling = GREEDY,
        samples: int = 1,
        dtype: Any = jnp.float32,
    ):
        config = nnx.merge(graph, parameters).language_model.config
        _check(batch, max_new_tokens, samples, config.max_position_embeddings)
        self.max_new_tokens = max_new_tokens
        self._model = graph, dtype, parameters
        self._settings = sampling.settings(batch.rows * samples, config.vocab_size)
        self._end_ids = frozenset(int(id) for id in end_ids)
        self._ending = Ending(jnp.asarray(end_ids, jnp.int32), jnp.int32(pad_id))
        batch = extended_left(batch, bucket(batch.tokens.shape[1]))
        shape = bucket(max_new_tokens), samples
        self._layers, self.state = _start(graph, shape, dtype, parameters, batch, self._settings, self._ending)

    @property
    def tokens(self) -> Int[np.ndarray, "B M"]:
        """What there is so far, as wide as the longest row."""
        return np.asarray(self.state.tokens)[:, : self.lengths.max()]

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """How many tokens each row has, its end included."""
        return np.asarray(self.state.length)

    @property
    def answers(self) -> list[Int[np.ndarray, " M"]]:
        """The tokens of each row without the end that it produced, and without what pads."""
        rows = [row[:length] for row, length in zip(self.tokens, self.lengths, strict=True)]
        return [row[:-1] if row[-1] in self._end_ids else row for row in rows]

    @property
    def done(self) -> bool:
        """Every row has ended, or has max_new_tokens."""
        return int(self.state.count) >= self.max_new_tokens or bool(self.state.ended.all())

    def advance(self, count: int) -> None:
        """Decodes until there are `count` tokens, or every row has ended."""
        limit = jnp.int32(min(count, self.max_new_tokens))
        graph, dtype, parameters = self._model
        self.state = _continue(graph, dtype, parameters, self._layers, self.state, limit, self._settings, self._ending)

    def cut(self, lengths: Mapping[int, int]) -> None:
        """Ends rows: {row: how many of its tokens stay}."""
        tokens, ended, length = (np.array(x) for x in (self.state.tokens, self.state.ended, self.state.length))
        for row, kept in lengths.items():
            tokens[row, kept:], ended[row], length[row] = int(self._ending.pad_id), True, kept
        changed = {"tokens": tokens, "ended": ended, "length": length}
        self.state = replace(self.state, **jax.tree.map(jnp.asarray, changed))


def _check(batch: Batch, max_new_tokens: int, samples: int, context: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("samples of a prompt", samples)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    for row in np.flatnonzero(np.asarray(batch.segment_ids)[:, -1] == 0):
        raise ValueError(f"row {row} is empty or padded on the right: prompts end in the last column")
    longest = int(np.max(np.asarray(batch.positions)[:, -1])) + 1
    if longest + max_new_tokens > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, the context holds "
            f"{context}: shorten the prompt or lower max_new_tokens to {max(context - longest, 0)}"
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _start(graph, shape, dtype, parameters: nnx.State, batch: Batch, settings: Settings, ending: Ending):
    """Runs the prompts and draws each row's first token: (the layers one by one, Decoding). `shape`: room, samples."""
    room, samples = shape
    model = nnx.merge(graph, parameters)
    segment_id = batch.segment_ids[:, -1]
    slots = jnp.concatenate([batch.segment_ids, jnp.repeat(segment_id[:, None], room, axis=1)], axis=1)
    decoder = model.language_model
    x, cache = decoder.prefill(model.embed(batch, dtype), batch.positions, model.mask(batch), slots)
    logits, held = decoder.unembed(x[:, -1]), None
    if settings.repetition_penalty is not None:
        rows = jnp.arange(batch.rows)[:, None]
        held = jnp.zeros(logits.shape, bool).at[rows, batch.tokens].max(batch.segment_ids == segment_id[:, None])
    each = partial(jnp.repeat, repeats=samples, axis=0)
    logits, held, segment_id, position = jax.tree.map(each, (logits, held, segment_id, batch.positions[:, -1] + 1))
    cache = replace(cache, layers=jax.tree.map(each, cache.layers), segment_ids=each(cache.segment_ids))
    token = sample(logits, settings, jnp.int32(0), held)
    state = Decoding(
        cache=cache,
        token=token,
        position=position,
        segment_id=segment_id,
        ended=jnp.isin(token, ending.end_ids),
        length=jnp.ones_like(token),
        tokens=jnp.full((len(token), room), ending.pad_id).at[:, 0].set(token),
        count=jnp.int32(1),
        held=_with(held, token),
    )
    return decoder.one_by_one(), state


def _with(held: Bool[Array, "B V"] | None, token: Int[Array, " B"]) -> Bool[Array, "B V"] | None:
    return None if held is None else held.at[jnp.arange(len(token)), token].set(True)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _continue(graph, dtype, parameters, layers, state: Decoding, limit, settings: Settings, ending: Ending) -> Decoding:
    """Decodes until `limit` tokens are there or every row has ended."""
    decoder = nnx.merge(graph, parameters).language_model

    def one_more(state: Decoding) -> Decoding:
        x = decoder.embed_ids(state.token[:, None], dtype)
        mask = state.cache.mask(state.segment_id[:, None])
        x, cache, _ = decoder.decoder(x, state.position[:, None], mask, state.cache, layers=layers)
        token = sample(decoder.unembed(x[:, 0]), settings, state.count, state.held)
        token = jnp.where(state.ended, ending.pad_id, token)
        return Decoding(
            cache=cache,
            token=token,
            position=state.position + 1,
            segment_id=state.segment_id,
            ended=state.ended | jnp.isin(token, ending.end_ids),
            length=state.length + ~state.ended,
            tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.count)),
            count=state.count + 1,
            held=_with(state.held, token),
        )

    return lax.while_loop(lambda state: (state.count < limit) & ~jnp.all(state.ended), one_more, state)
