"""Which token comes next."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: divides the logits; 0 takes the most likely token and leaves the rest aside.
    top_k: draw from the k most likely tokens; None is all.
    top_p: draw from the fewest most likely tokens (of those k) whose probabilities add up to at least this; None is
        all (nucleus sampling, Holtzman et al. 2020). Tokens as likely as the last one taken are taken too, as in top_k.
    min_p: draw from tokens at least this share as likely as the most likely one; None is all (Nguyen et al. 2024).
    repetition_penalty: divides the positive and multiplies the negative logits of tokens that the row, its prompt
        included, already holds; 1 changes nothing (Keskar et al. 2019). Also where the temperature is 0.
    seed: of the random numbers; a row's tokens depend on it and on the row's number, not on the other rows.

    Raises ValueError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected 0 (the most likely token) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: expected at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a share above 0 and up to 1, or None for all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: expected a share from 0 to 1, or None for all tokens")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: expected a positive number, 1 for none")

    def settings(self, rows: int, vocab_size: int) -> "Settings":
        """As arrays, so that other values compile nothing anew."""
        key = jax.random.key(self.seed)
        return Settings(
            keys=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows)),
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(min(self.top_k or vocab_size, vocab_size)),
            top_p=jnp.float32(1.0 if self.top_p is None else self.top_p),
            min_p=jnp.float32(self.min_p or 0.0),
            repetition_penalty=None if self.repetition_penalty == 1 else jnp.float32(self.repetition_penalty),
        )


GREEDY = Sampling()


class Settings(NamedTuple):
    keys: Key[Array, " B"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""] | None  # None: nobody keeps track of what a row holds


def sample(
    logits: Float[Array, "B V"], settings: Settings, step: Int[Array, " B"], held: Bool[Array, "B V"] | None = None
) -> Int[Array, " B"]:
    """One token for each row; `step` says how many tokens the row has had, `held` which are in it and its prompt."""
    if settings.repetition_penalty is not None:
        penalty = settings.repetition_penalty
        logits = jnp.where(held, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def drawn():
        # At most 0, so that the smallest temperature gives no infinity whose differences are NaN.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / settings.temperature
        kept = jnp.where(likely(scaled, settings.top_k, settings.top_p, settings.min_p), scaled, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in)(settings.keys, step)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    def greedy():
        return lax.top_k(logits, 1)[1][:, 0]  # on the CPU four times as fast as argmax

    return lax.cond(settings.temperature == 0, greedy, drawn)


def likely(
    logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""], min_p: Float[Array, ""]
) -> Bool[Array, "B V"]:
    """The tokens that top_k, then top_p, then min_p leave."""
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    kept = at_least(weights, jnp.ones_like(weights), top_k.astype(weights.dtype))
    weights = jnp.where(kept, weights, 0)
    return kept & at_least(weights, weights, top_p * jnp.sum(weights, axis=-1)) & (weights >= min_p)


def at_least(
    values: Float[Array, "B V"], amounts: Float[Array, "B V"], total: Float[Array, "..."]
) -> Bool[Array, "B V"]:
    """The largest values of a row, as many as it takes for their amounts to sum up to `total`.

    `values` in [0, 1], float32. The smallest value to keep is searched by bisection of its bits (floats from 0 up are
    ordered as their bits are): 30 sums are much faster than sorting a vocabulary, on any device.
    """
    value_of = lambda bits: lax.bitcast_convert_type(bits, jnp.float32)[:, None]  # noqa: E731

    def halve(_, ends):
        low, high = ends
        middle = (low + high) // 2
        enough = jnp.sum(jnp.where(values >= value_of(middle), amounts, 0), axis=-1) >= total
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    above_one = lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
    start = jnp.zeros(values.shape[0], jnp.int32), jnp.full(values.shape[0], above_one)
    low, _ = lax.fori_loop(0, 30, halve, start)  # 1.0 has 30 bits
    return values >= value_of(low)
