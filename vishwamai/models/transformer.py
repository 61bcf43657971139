"""The decoder: embed -> layers -> unembed. Document models change only how embeddings are made."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import Mask
from vishwamai.data.batch import Batch
from vishwamai.models.attention import Attention
from vishwamai.models.cache import KeysValues, KVCache, filled
from vishwamai.models.config import LayerKind, LayerType, Remat, Softmax, TextConfig
from vishwamai.models.layers import Embedding, Linear, RMSNorm, few_rows
from vishwamai.models.mlp import GatedMLP
from vishwamai.models.moe import MixtureOfExperts, Routing
from vishwamai.models.pattern import by_number, find_pattern, make_layers, one_by_one, run
from vishwamai.models.rope import Angles, rotary
from vishwamai.parallel.sharding import constrain

ACTIVATION = ("rows", None, None)  # rows over devices; what a row holds is whole on each

CHECKPOINT = {
    Remat.NONE: None,
    Remat.DOTS: lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_saveable),
    Remat.FULL: jax.checkpoint,
}


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each on a residual branch behind a norm, with sandwich norms also before one."""

    def __init__(self, config: TextConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        norm = partial(make_norm, config, rngs=rngs)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, kind.attention, rngs=rngs)
        self.post_attention_layernorm = norm()
        if config.sandwich_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        dense = partial(GatedMLP, config, config.intermediate_size)
        self.mlp = MixtureOfExperts(config, rngs=rngs) if kind.sparse else dense(rngs=rngs)
        self.sandwich_norms = config.sandwich_norms
        self.sparse = kind.sparse

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Angles,
        mask: Mask,
        past: KeysValues | None = None,
        length: Int[Array, "..."] | None = None,
        drops: bool = False,
        softmax: Softmax = Softmax.RUNNING,
    ) -> tuple[Float[Array, "B T D"], KeysValues, Routing | None]:
        attended, keys_values = self.self_attn(self.input_layernorm(x), angles, mask, past, length, softmax)
        if self.sandwich_norms:
            x = x + self.post_attention_layernorm(attended)
            fed, routing = self._feed_forward(self.pre_feedforward_layernorm(x), mask, drops)
            return x + self.post_feedforward_layernorm(fed), keys_values, routing
        x = x + attended
        fed, routing = self._feed_forward(self.post_attention_layernorm(x), mask, drops)
        return x + fed, keys_values, routing

    def _feed_forward(self, x, mask: Mask, drops: bool) -> tuple[Float[Array, "B T D"], Routing | None]:
        if not self.sparse:
            return self.mlp(x), None
        real = jnp.ones(x.shape[:2], bool) if mask.q_segment_ids is None else jnp.asarray(mask.q_segment_ids) > 0
        return self.mlp(x, real, drops)


def make_norm(config: TextConfig, *, rngs: nnx.Rngs) -> RMSNorm:
    """Of the residual stream."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs, zero_centered=config.zero_centered_norms)


class Decoded(NamedTuple):
    """What the decoder makes of a batch.

    routing: of each stack of mixture layers (see models.pattern), by its name; stacked layers have a first axis.
    """

    hidden: Float[Array, "B T D"]
    cache: KVCache | None
    routing: dict[str, Routing]


class Transformer(nnx.Module):
    """A decoder-only language model.

    `dtype` is the compute dtype; parameters keep their own. Raises nothing: shapes are checked by the callers that
    take user input.
    """

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        init = initializers.normal(config.initializer_range)
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ("vocab", "embed"), rngs=rngs, init=init)
        self.pattern = find_pattern(config.kinds)
        self.layers = make_layers(lambda kind, rngs: DecoderLayer(config, kind, rngs=rngs), config.kinds, rngs)
        self.norm = make_norm(config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, ("embed", "vocab"), rngs=rngs, init=init)

    @property
    def language_model(self) -> "Transformer":
        """What decodes text: of a document model it is a part, here it is all."""
        return self

    def embed(self, batch: Batch, dtype=jnp.float32) -> Float[Array, "B T D"]:
        return self.embed_ids(batch.tokens, dtype)

    def embed_ids(self, ids: Int[Array, "B T"], dtype=jnp.float32) -> Float[Array, "B T D"]:
        x = self.embed_tokens(ids, dtype)
        return x * jnp.asarray(self.config.hidden_size**0.5, dtype) if self.config.scale_embeddings else x

    def max_logit(self, dtype: jnp.dtype) -> Float[Array, ""]:
        """What no |logit| of any layer's attention exceeds (`Attention.max_logit`)."""
        layers = [module for _, module in nnx.iter_graph(self.layers) if isinstance(module, Attention)]
        return jnp.max(jnp.stack([layer.max_logit(dtype) for layer in layers]))

    def angles(self, positions: Int[Array, "B T"]) -> Angles:
        ropes = {kind.attention: self.config.rope(kind.attention) for kind in self.config.kinds}
        turned = {rope: rotary(positions, self.config.head_dim, *rope) for rope in dict.fromkeys(ropes.values())}
        return {kind: turned[rope] for kind, rope in ropes.items()}

    def decoder(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Mask,
        cache: KVCache | None = None,
        remat: Remat = Remat.NONE,
        layers: Sequence[DecoderLayer] | None = None,
        drops: bool = False,
        softmax: Softmax = Softmax.RUNNING,
    ) -> Decoded:
        """All layers and the final norm.

        With a cache, T more tokens of each row are written into it; `mask` is then `cache.mask(...)`. `layers` are
        `self.one_by_one()`: whoever decodes in a loop makes them once, before the loop. `drops`: experts are bounded
        by their capacity, which only training asks for, as it does for another `softmax`.
        """
        angles = self.angles(positions)
        if cache is None:

            def body(layer: DecoderLayer, x):
                x, _, routing = layer(x, angles, mask, drops=drops, softmax=softmax)
                return constrain(x, *ACTIVATION), routing

            x, found = run(self.layers, self.pattern, body, constrain(x, *ACTIVATION), CHECKPOINT[remat])
            return Decoded(self.norm(x), None, {name: routing for name, routing in found.items() if routing})
        written = []
        for layer, past in zip(layers or self.one_by_one(), cache.layers, strict=True):
            x, keys_values, _ = layer(x, angles, mask, past, cache.length)
            written.append(keys_values)
        cache = KVCache(tuple(written), cache.segment_ids, cache.length + positions.shape[1])
        return Decoded(self.norm(x), cache, {})

    def prefill(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Mask,
        segment_ids: Int[Array, "B S"],
        at_a_time: int = 1,
        cache_dtype: str | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """As `decoder` without a cache, and a cache of the T tokens with S - T free slots (their segments known).

        A layer with a window keeps no more tokens than that, and room for others where they are to come several
        `at_a_time`: the earliest of these sees the whole window when the latest is written. `cache_dtype`: int8 or
        float8_e4m3fn quantises the cache; the prompt itself is attended to as it was computed.
        """
        angles = self.angles(positions)

        def body(layer: DecoderLayer, x):
            x, keys_values, _ = layer(x, angles, mask)
            return x, keys_values.quantized(cache_dtype) if cache_dtype else keys_values

        x, found = run(self.layers, self.pattern, body, x)
        windows = (
            self.config.sliding_window if kind.attention is LayerType.SLIDING else None for kind in self.config.kinds
        )
        slots = segment_ids.shape[1]
        layers = (
            filled(prompt, min(slots, window + at_a_time - 1 if window else slots))
            for prompt, window in zip(by_number(self.pattern, found), windows, strict=True)
        )
        return self.norm(x), KVCache(tuple(layers), segment_ids, jnp.int32(positions.shape[1]))

    def one_by_one(self) -> list[DecoderLayer]:
        """The layers in order, as decoding in a loop wants them (`layers.unstack`)."""
        return one_by_one(self.layers, self.pattern)

    def mask(self, batch: Batch) -> Mask:
        """Causal inside each example of a row."""
        return Mask(causal=True, q_segment_ids=batch.segment_ids, kv_segment_ids=batch.segment_ids)

    def decoded(self, batch: Batch, dtype=jnp.float32, remat: Remat = Remat.NONE, **options: Any) -> Decoded:
        """Whole rows; packed examples do not see each other. Options as `decoder`'s: drops, softmax."""
        return self.decoder(self.embed(batch, dtype), batch.positions, self.mask(batch), remat=remat, **options)

    def hidden_states(self, batch: Batch, dtype=jnp.float32, remat: Remat = Remat.NONE) -> Float[Array, "B T D"]:
        return self.decoded(batch, dtype, remat).hidden

    def unembed(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits."""
        cap = self.config.final_logit_softcapping
        logits = self._logits(x)
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding[...].astype(x.dtype)
            if x.ndim == 2 and jax.default_backend() == "cpu":
                return few_rows(x, table)
            return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
        return jnp.matmul(x, self.lm_head.kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
