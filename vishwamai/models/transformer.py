"""The decoder: embed -> layers -> unembed. Document models change only how embeddings are made."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import Mask
from vishwamai.data.batch import Batch
from vishwamai.models.attention import Attention, KeysValues, KVCache
from vishwamai.models.config import Remat, TextConfig
from vishwamai.models.layers import Embedding, Linear, RMSNorm, few_rows, scan, stack, unstack
from vishwamai.models.rope import rotary
from vishwamai.parallel.sharding import constrain

ACTIVATION = ("rows", None, None)  # rows over devices; what a row holds is whole on each

CHECKPOINT = {
    Remat.NONE: None,
    Remat.DOTS: lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_saveable),
    Remat.FULL: jax.checkpoint,
}


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, inner, init = config.hidden_size, config.intermediate_size, initializers.normal(config.initializer_range)
        options = dict(rngs=rngs, init=init, bias=config.mlp_bias)
        self.gate_proj = Linear(width, inner, ("embed", "mlp"), **options)
        self.up_proj = Linear(width, inner, ("embed", "mlp"), **options)
        self.down_proj = Linear(inner, width, ("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each on a residual branch."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x, angles, mask: Mask, past: KeysValues | None = None, length=None):
        attended, keys_values = self.self_attn(self.input_layernorm(x), angles, mask, past, length)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class Transformer(nnx.Module):
    """A decoder-only language model.

    `dtype` is the compute dtype; parameters keep their own. Raises nothing: shapes are checked by the callers that
    take user input.
    """

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        init = initializers.normal(config.initializer_range)
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ("vocab", "embed"), rngs=rngs, init=init)
        self.layers = stack(lambda rngs: DecoderLayer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, ("embed", "vocab"), rngs=rngs, init=init)

    @property
    def language_model(self) -> "Transformer":
        """What decodes text: of a document model it is a part, here it is all."""
        return self

    def embed(self, batch: Batch, dtype=jnp.float32) -> Float[Array, "B T D"]:
        return self.embed_tokens(batch.tokens, dtype)

    def angles(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
        return rotary(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

    def decoder(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Mask,
        cache: KVCache | None = None,
        remat: Remat = Remat.NONE,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """All layers and the final norm.

        With a cache, T more tokens of each row are written into it; `mask` is then `cache.mask(...)`. `layers` are
        `unstack(self.layers)`: whoever decodes in a loop makes them once, before the loop.
        """
        angles = self.angles(positions)
        if cache is None:
            body = lambda layer, x, _: (constrain(layer(x, angles, mask)[0], *ACTIVATION), None)  # noqa: E731
            x, _ = scan(self.layers, body, constrain(x, *ACTIVATION), None, CHECKPOINT[remat])
            return self.norm(x), None
        written = []
        for layer, past in zip(layers or unstack(self.layers), cache.layers, strict=True):
            x, keys_values = layer(x, angles, mask, past, cache.length)
            written.append(keys_values)
        return self.norm(x), KVCache(tuple(written), cache.segment_ids, cache.length + positions.shape[1])

    def prefill(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], mask: Mask, segment_ids: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """As `decoder` without a cache, and a cache of the T tokens with S - T free slots (their segments known)."""
        angles = self.angles(positions)
        x, (keys, values) = scan(self.layers, lambda layer, x, _: layer(x, angles, mask), x)
        length, slots = positions.shape[1], segment_ids.shape[1]
        free = ((0, 0), (0, 0), (0, slots - length), (0, 0))
        layers = tuple(
            KeysValues(jnp.pad(keys[i], free), jnp.pad(values[i], free)) for i in range(self.config.num_hidden_layers)
        )
        return self.norm(x), KVCache(layers, segment_ids, jnp.int32(length))

    def mask(self, batch: Batch) -> Mask:
        """Causal inside each example of a row."""
        return Mask(causal=True, q_segment_ids=batch.segment_ids, kv_segment_ids=batch.segment_ids)

    def hidden_states(self, batch: Batch, dtype=jnp.float32, remat: Remat = Remat.NONE) -> Float[Array, "B T D"]:
        """Final hidden states of whole rows; packed examples do not see each other."""
        return self.decoder(self.embed(batch, dtype), batch.positions, self.mask(batch), remat=remat)[0]

    def unembed(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits."""
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding[...].astype(x.dtype)
            if x.ndim == 2 and jax.default_backend() == "cpu":
                return few_rows(x, table)
            return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
        return jnp.matmul(x, self.lm_head.kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
