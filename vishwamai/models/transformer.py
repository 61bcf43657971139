"""The decoder: embed -> layers -> unembed. Document models change only how embeddings are made."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import Mask
from vishwamai.data.batch import Batch
from vishwamai.models.attention import Attention, KVCache, rotary
from vishwamai.models.config import Remat, TextConfig
from vishwamai.models.layers import Embedding, Linear, RMSNorm, scan, stack

CHECKPOINT = {
    Remat.NONE: None,
    Remat.DOTS: lambda body: jax.checkpoint(body, policy=jax.checkpoint_policies.dots_saveable),
    Remat.FULL: jax.checkpoint,
}


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, inner, init = config.hidden_size, config.intermediate_size, initializers.normal(config.initializer_range)
        self.gate_proj = Linear(width, inner, ("embed", "mlp"), rngs=rngs, init=init)
        self.up_proj = Linear(width, inner, ("embed", "mlp"), rngs=rngs, init=init)
        self.down_proj = Linear(inner, width, ("mlp", "embed"), rngs=rngs, init=init)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each on a residual branch."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x, angles, mask: Mask, cache: KVCache | None = None):
        attended, cache = self.self_attn(self.input_layernorm(x), angles, mask, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


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

    def embed(self, batch: Batch, dtype=jnp.float32) -> Float[Array, "B T D"]:
        return self.embed_tokens(batch.tokens, dtype)

    def decoder(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Mask,
        cache: KVCache | None = None,
        remat: Remat = Remat.NONE,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """All layers and the final norm. With a cache (layers stacked), T new tokens are written at `cache.length`."""
        angles = rotary(positions, self.config.head_dim, self.config.rope_theta)

        def layer(module: DecoderLayer, x, layer_cache):
            return module(x, angles, mask, layer_cache)

        per_layer = None
        if cache is not None:
            depth = self.config.num_hidden_layers
            per_layer = dataclasses.replace(
                cache,
                segment_ids=jnp.broadcast_to(cache.segment_ids, (depth, *cache.segment_ids.shape)),
                length=jnp.broadcast_to(cache.length, (depth,)),
            )
        x, written = scan(self.layers, layer, x, per_layer, CHECKPOINT[remat])
        if cache is not None:
            cache = dataclasses.replace(
                cache, keys=written.keys, values=written.values, length=cache.length + positions.shape[1]
            )
        return self.norm(x), cache

    def hidden_states(self, batch: Batch, dtype=jnp.float32, remat: Remat = Remat.NONE) -> Float[Array, "B T D"]:
        """Final hidden states of whole rows; packed examples do not see each other."""
        mask = Mask(causal=True, q_segment_ids=batch.segment_ids, kv_segment_ids=batch.segment_ids)
        return self.decoder(self.embed(batch, dtype), batch.positions, mask, remat=remat)[0]

    def unembed(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits."""
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding[...].astype(x.dtype)
            return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
        return jnp.matmul(x, self.lm_head.kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
