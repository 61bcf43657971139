"""The compiled part of generation: prefill, then a loop that decodes until every row has ended.

With a draft, each turn of the loop is one of speculative decoding (Leviathan et al., arXiv 2211.17192): the draft, a
smaller model, proposes the next few tokens, and the model reads them all at once. The tokens are what the model itself
then chooses, up to the first that was not proposed: what it read behind that one is forgotten. Draft and model draw
with the same random numbers (Daliri et al., arXiv 2408.07978): so they often agree, and a seed gives the tokens that
it gives without a draft, at any temperature.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from vishwamai.data.batch import Batch
from vishwamai.generation.sampling import Settings, sample
from vishwamai.models.cache import KeysValues, KVCache
from vishwamai.models.transformer import DecoderLayer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """What `nnx.merge` makes a model of, and the dtype of its computation and its cache."""

    parameters: nnx.State
    graph: nnx.GraphDef = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})

    def merged(self) -> nnx.Module:
        return nnx.merge(self.graph, self.parameters)


class Models(NamedTuple):
    """A model and the draft that proposes to it, or the layers of both, one by one."""

    model: Model | list[DecoderLayer]
    draft: Model | list[DecoderLayer] | None


class Sizes(NamedTuple):
    """What shapes follow from. room: columns of the answers; samples: rows of each prompt."""

    room: int
    samples: int
    draft_tokens: int  # proposed in each turn
    log_probabilities: bool  # whether they are kept
    cache_dtype: str | None = None  # that keys and values are quantised to


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Where a batch stands: between two turns of the loop, or between two calls of it."""

    cache: KVCache  # with a draft, its length is each row's own
    draft: tuple[KeysValues, ...] | None  # the draft's layers, of the same tokens
    token: Int[Array, " B"]  # the latest of each row: written, but not yet in the cache
    position: Int[Array, " B"]
    segment_id: Int[Array, " B"]
    ended: Bool[Array, " B"]
    length: Int[Array, " B"]  # how many tokens each row has, its end included
    tokens: Int[Array, "B M"]  # what was generated, with room for more
    log_probabilities: Float[Array, "B M"] | None  # of these tokens, where they are kept
    held: Bool[Array, "B V"] | None  # the tokens of each row's prompt and answer, where a penalty asks for them
    proposed: Int[Array, ""]  # tokens, by the draft, to rows that had not ended
    accepted: Int[Array, ""]  # how many of these became tokens of an answer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ending:
    """The ids after which a row is over, and the id it is then filled with."""

    end_ids: Int[Array, " E"]
    pad_id: Int[Array, ""]


@partial(jax.jit, static_argnames="sizes")
def start(models: Models, batch: Batch, settings: Settings, ending: Ending, sizes: Sizes) -> tuple[Models, Decoding]:
    """Runs the prompts and draws each row's first token: (the layers of both models, where the batch stands)."""
    segment_id = batch.segment_ids[:, -1]
    # The last turn may write proposals behind the last token of an answer.
    free = jnp.repeat(segment_id[:, None], sizes.room + sizes.draft_tokens, axis=1)
    slots = jnp.concatenate([batch.segment_ids, free], axis=1)

    def prefill(model: Model):
        whole = model.merged()
        decoder, x = whole.language_model, whole.embed(batch, model.dtype)
        x, cache = decoder.prefill(
            x, batch.positions, whole.mask(batch), slots, sizes.draft_tokens + 1, sizes.cache_dtype
        )
        return decoder, x[:, -1], cache

    decoder, x, cache = prefill(models.model)
    logits, layers, draft, held = decoder.unembed(x), Models(decoder.one_by_one(), None), None, None
    if models.draft is not None:
        drafter, _, draft = prefill(models.draft)
        layers, draft = layers._replace(draft=drafter.one_by_one()), draft.layers
    if settings.repetition_penalty is not None:
        rows = jnp.arange(batch.rows)[:, None]
        held = jnp.zeros(logits.shape, bool).at[rows, batch.tokens].max(batch.segment_ids == segment_id[:, None])
    each = partial(jnp.repeat, repeats=sizes.samples, axis=0)
    logits, held, segment_id, position = jax.tree.map(each, (logits, held, segment_id, batch.positions[:, -1]))
    written, draft, slots = jax.tree.map(each, (cache.layers, draft, slots))
    rows = len(segment_id)
    none, answers = jnp.zeros(rows, jnp.int32), (rows, sizes.room)
    state = Decoding(
        cache=KVCache(written, slots, cache.length if draft is None else jnp.repeat(cache.length, rows)),
        draft=draft,
        token=none,
        position=position,
        segment_id=segment_id,
        ended=none > 0,
        length=none,
        tokens=jnp.full(answers, ending.pad_id),
        log_probabilities=jnp.zeros(answers) if sizes.log_probabilities else None,
        held=held,
        proposed=jnp.int32(0),
        accepted=jnp.int32(0),
    )
    chosen = sample(logits, settings, none, held)
    return layers, _appended(state, chosen[:, None], none[:, None] == 0, logits, ending)


@partial(jax.jit, static_argnames="draft_tokens", donate_argnames="state")
def proceed(
    models: Models,
    layers: Models,
    state: Decoding,
    limit: Int[Array, ""],
    settings: Settings,
    ending: Ending,
    draft_tokens: int,
) -> Decoding:
    """Decodes until every row has `limit` tokens or has ended."""
    decoders = Models(*(model and model.merged().language_model for model in models))
    ahead = jnp.arange(draft_tokens + 1)

    def logits_of(which: str, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], state: Decoding, cache: KVCache):
        """Of all tokens, row after row, and the cache with them."""
        decoder, own = getattr(decoders, which), getattr(layers, which)
        x = decoder.embed_ids(tokens, getattr(models, which).dtype)
        mask = cache.mask(jnp.broadcast_to(state.segment_id[:, None], tokens.shape))
        x, cache, _ = decoder.decoder(x, positions, mask, cache, layers=own)
        return decoder.unembed(x.reshape(-1, x.shape[-1])), cache

    def propose(state: Decoding):
        """What the model is to read, `B T`, what each row holds at each of these tokens, and the draft's layers."""

        def one(carry, step):
            cache, token, held = carry
            logits, cache = logits_of("draft", token[:, None], (state.position + step)[:, None], state, cache)
            following = sample(logits, settings, state.length + step, held)
            return (cache, following, _holding(held, following[:, None])), (token, held)

        # The last step's token is of no use, but that step writes the last proposal into the cache.
        first = replace(state.cache, layers=state.draft), state.token, state.held
        (cache, *_), found = lax.scan(one, first, ahead)
        tokens, held = jax.tree.map(lambda x: x.swapaxes(0, 1), found)
        return tokens, held, cache.layers

    def turn(state: Decoding) -> Decoding:
        if state.draft is None:
            tokens, held, draft = state.token[:, None], state.held, None
        else:
            tokens, held, draft = propose(state)
            held = None if held is None else held.reshape(-1, held.shape[-1])
        steps = state.length[:, None] + ahead
        logits, cache = logits_of("model", tokens, state.position[:, None] + ahead, state, state.cache)
        each = settings._replace(keys=jnp.repeat(settings.keys, len(ahead)))
        chosen = sample(logits, each, steps.reshape(-1), held).reshape(tokens.shape)
        agreed = jnp.cumprod(chosen[:, :-1] == tokens[:, 1:], axis=1).sum(axis=1, keepdims=True)
        ends = jnp.isin(chosen, ending.end_ids)
        going = ~state.ended[:, None] & (steps < limit)
        new = going & (ahead <= agreed) & (jnp.cumsum(ends, axis=1) - ends == 0)
        if draft is not None:
            cache = replace(cache, length=state.cache.length + new.sum(axis=1))
        state = replace(
            state,
            cache=cache,
            draft=draft,
            proposed=state.proposed + draft_tokens * going[:, 0].sum(),
            accepted=state.accepted + (new & (ahead < agreed)).sum(),
        )
        return _appended(state, chosen, new, logits, ending)

    return lax.while_loop(lambda state: jnp.any(~state.ended & (state.length < limit)), turn, state)


def _appended(
    state: Decoding, chosen: Int[Array, "B T"], new: Bool[Array, "B T"], logits: Float[Array, "BT V"], ending: Ending
) -> Decoding:
    """With those of the tokens that are `new`, none or the first ones of each row, drawn from these logits."""
    rows, count = jnp.arange(len(chosen))[:, None], new.sum(axis=1)
    column = jnp.where(new, state.length[:, None] + jnp.arange(chosen.shape[1]), state.tokens.shape[1])
    write = lambda array, values: array.at[rows, column].set(values, mode="drop")  # noqa: E731
    latest = jnp.take_along_axis(chosen, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    known = state.log_probabilities
    if known is not None:
        picked = jnp.take_along_axis(logits, chosen.reshape(-1, 1), axis=1)[:, 0]
        known = write(known, (picked - jax.nn.logsumexp(logits, axis=-1)).reshape(chosen.shape))
    return replace(
        state,
        token=jnp.where(count > 0, latest, state.token),
        position=state.position + count,
        ended=state.ended | jnp.any(new & jnp.isin(chosen, ending.end_ids), axis=1),
        length=state.length + count,
        tokens=write(state.tokens, chosen),
        log_probabilities=known,
        held=_holding(state.held, chosen, new),
    )


def _holding(held: Bool[Array, "B V"] | None, tokens: Int[Array, "B T"], new: Bool[Array, "B T"] | bool = True):
    """`held`, where it is kept, with those of the tokens that are new."""
    if held is None:
        return None
    index = jnp.where(new, tokens, held.shape[1])
    return held.at[jnp.arange(len(held))[:, None], index].set(True, mode="drop")
