"""A batch that is being continued, seen from outside. The same for every model.

A model brings `embed(batch)`, `mask(batch)` and `language_model`: images matter to the prompt's embeddings only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from kernels.decode_attention.quantized import LARGEST
from vishwamai.data.batch import Batch
from vishwamai.generation.decoding import Ending, Model, Models, Sizes, proceed, start
from vishwamai.generation.prompts import bucket, extended_left
from vishwamai.generation.sampling import GREEDY, Sampling
from vishwamai.models.config import TextConfig


class Draft(NamedTuple):
    """A smaller model that proposes so many tokens at a time (see `generation.decoding`)."""

    graph: nnx.GraphDef
    parameters: nnx.State
    tokens: int = 4
    dtype: Any = jnp.float32


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
        dtype: of the computation, and of the cache where cache_dtype is None.
        draft: what proposes tokens. The tokens are the same as without (up to ties that rounding decides), sooner
            where it is much smaller and often right; each row goes on by what it accepts, alone.
        keep_log_probabilities: for `log_probabilities`.
        cache_dtype: "int8" or "float8_e4m3fn" keeps keys and values of past tokens, the draft's too, in it, each vector
            with a float32 scale of its own: a half or less of the memory, and nearly the same logits. None: in `dtype`.

    Raises:
        ValueError: an empty prompt, padding at its end, more tokens than the model's context holds, a draft with
            another vocabulary, or a cache_dtype that is none of these.
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
        draft: Draft | None = None,
        keep_log_probabilities: bool = False,
        cache_dtype: str | None = None,
    ):
        config = _config(graph, parameters)
        check_cache_dtype(cache_dtype)
        _check(batch, max_new_tokens, samples, config.max_position_embeddings)
        if draft is not None:
            _check_draft(draft, config.vocab_size)
        self.max_new_tokens = max_new_tokens
        self._models = Models(
            Model(parameters, graph, dtype), draft and Model(draft.parameters, draft.graph, draft.dtype)
        )
        self._draft_tokens = draft.tokens if draft else 0
        self._settings = sampling.settings(batch.rows * samples, config.vocab_size)
        self._end_ids = frozenset(int(id) for id in end_ids)
        self._ending = Ending(jnp.asarray(end_ids, jnp.int32), jnp.int32(pad_id))
        batch = extended_left(batch, bucket(batch.tokens.shape[1]))
        sizes = Sizes(bucket(max_new_tokens), samples, self._draft_tokens, keep_log_probabilities, cache_dtype)
        self._layers, self.state = start(self._models, batch, self._settings, self._ending, sizes=sizes)

    @property
    def tokens(self) -> Int[np.ndarray, "B M"]:
        """What there is so far, as wide as the longest row."""
        return np.asarray(self.state.tokens)[:, : self.lengths.max()]

    @property
    def log_probabilities(self) -> Float[np.ndarray, "B M"]:
        """Of each token, given what stands before it; float32, 0 behind a row's end. `keep_log_probabilities` asks.

        They are the model's own, of its logits as they are: before temperature, penalty and truncation.
        """
        return np.asarray(self.state.log_probabilities)[:, : self.lengths.max()]

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
    def proposed(self) -> int:
        """How many tokens the draft has proposed."""
        return int(self.state.proposed)

    @property
    def accepted(self) -> int:
        """How many tokens of the answers the draft had proposed."""
        return int(self.state.accepted)

    @property
    def done(self) -> bool:
        """Every row has ended, or has max_new_tokens."""
        return bool((self.state.ended | (self.state.length >= self.max_new_tokens)).all())

    def advance(self, count: int) -> None:
        """Decodes until every row has `count` tokens, or has ended."""
        limit = jnp.int32(min(count, self.max_new_tokens))
        self.state = proceed(
            self._models, self._layers, self.state, limit, self._settings, self._ending, draft_tokens=self._draft_tokens
        )

    def cut(self, lengths: Mapping[int, int]) -> None:
        """Ends rows: {row: how many of its tokens stay}."""
        names = ("tokens", "log_probabilities", "ended", "length")
        changed = {name: np.array(x) for name in names if (x := getattr(self.state, name)) is not None}
        for row, kept in lengths.items():
            changed["tokens"][row, kept:], changed["ended"][row] = int(self._ending.pad_id), True
            changed["length"][row] = kept
            if "log_probabilities" in changed:
                changed["log_probabilities"][row, kept:] = 0
        self.state = replace(self.state, **jax.tree.map(jnp.asarray, changed))


def check_cache_dtype(cache_dtype: str | None) -> None:
    """Raises ValueError for one that a cache can't be quantised to."""
    if cache_dtype is not None and cache_dtype not in LARGEST:
        raise ValueError(f"cache_dtype={cache_dtype!r}: expected {', '.join(LARGEST)}, or None to quantise nothing")


def _config(graph: nnx.GraphDef, parameters: nnx.State) -> TextConfig:
    return nnx.merge(graph, parameters).language_model.config


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


def _check_draft(draft: Draft, vocab_size: int) -> None:
    if draft.tokens < 1:
        raise ValueError(f"draft_tokens={draft.tokens}: expected at least 1")
    found = _config(draft.graph, draft.parameters).vocab_size
    if found != vocab_size:
        raise ValueError(
            f"the draft has a vocabulary of {found} tokens, the model of {vocab_size}: take a draft that was trained "
            "with the model's tokenizer"
        )
