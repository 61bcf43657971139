"""Grouped-query self-attention with rotary positions, q/k norm, a window and a cache, each where there is one."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import Mask, attention, decode_attention
from vishwamai.models.cache import KeysValues, extended
from vishwamai.models.config import LayerType, Softmax, TextConfig
from vishwamai.models.layers import Linear, RMSNorm
from vishwamai.models.rope import Angles, frequencies, rotate
from vishwamai.parallel.sharding import attention_spec

FLOAT32_ERROR = 1e-4  # far above that of the norms, the rotation and a sum over a head in float32


class Attention(nnx.Module):
    """Causal self-attention of a decoder layer."""

    def __init__(self, config: TextConfig, kind: LayerType, *, rngs: nnx.Rngs):
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        width, init = config.hidden_size, initializers.normal(config.initializer_range)
        on_inputs, on_output = config.attention_bias.of_layers
        inputs = dict(rngs=rngs, init=init, bias=on_inputs)
        self.q_proj = Linear(width, heads, ("embed", "heads"), **inputs)
        self.k_proj = Linear(width, kv_heads, ("embed", "kv_heads"), **inputs)
        self.v_proj = Linear(width, kv_heads, ("embed", "kv_heads"), **inputs)
        self.o_proj = Linear(heads, width, ("heads", "embed"), rngs=rngs, init=init, bias=on_output)
        if config.qk_norm:
            options = dict(rngs=rngs, zero_centered=config.zero_centered_norms)
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, **options)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, **options)
        self.head_dim = config.head_dim
        self.kind = kind
        self.window = config.sliding_window if kind is LayerType.SLIDING else None
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping
        self.rotary_factor = frequencies(config.head_dim, *config.rope(kind))[1]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Angles,
        mask: Mask,
        past: KeysValues | None = None,
        length: Int[Array, ""] | None = None,
        softmax: Softmax = Softmax.RUNNING,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """The output, and the keys and values that it was made from.

        With `past`, the new ones are written behind the `length` tokens there, and `mask` speaks of all of them; the
        kernel of that has no use for a bounded softmax. Raises ValueError for one where nothing bounds the logits.
        """
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).reshape(split) for project in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles[self.kind]), rotate(k, angles[self.kind])
        max_logit = self.max_logit(q.dtype) if softmax is Softmax.BOUNDED else None
        attend, spec = partial(attention, max_logit=max_logit), attention_spec(q, k)
        keys_values = KeysValues(k.swapaxes(1, 2), v.swapaxes(1, 2))
        if past is not None:
            keys_values, (k, v), mask = extended(past, keys_values, mask, self.window, length)
            attend = decode_attention
        mask = replace(mask, window=self.window if mask.causal else None)
        out = attend(q, k, v, mask, scale=self.scale, logit_softcap=self.softcap, spec=spec)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), keys_values

    def max_logit(self, dtype: jnp.dtype) -> Float[Array, ""]:
        """What no |logit| exceeds, after scale and soft cap, with queries and keys computed in dtype; no gradient.

        Of layers that are stacked, what none exceeds in any.

        Normalised heads have length sqrt(H) before their gains. Rotation turns pairs (i, i + H/2) and keeps each one's
        length, but for YaRN's factor, so that by Cauchy and Schwarz |q . k| is at most H times the largest product
        over pairs of what their gains lengthen q's and k's by.
        """
        if not hasattr(self, "q_norm"):
            if self.softcap is None:
                raise ValueError(
                    "softmax=bounded: nothing bounds the logits of a model without qk_norm and attn_logit_softcapping, "
                    "take softmax=running"
                )
            return jnp.float32(self.softcap)
        of_q, of_k = (self._lengthened(norm, dtype) for norm in (self.q_norm, self.k_norm))
        length = self.head_dim * self.rotary_factor**2 * jnp.max(of_q * of_k)
        # Queries and keys are rounded behind the norm, the gain and the rotation, each by half an eps at most.
        rounding = (1 + float(jnp.finfo(dtype).eps) / 2) ** 6 * (1 + FLOAT32_ERROR)
        bound = jax.lax.stop_gradient(length * self.scale * rounding)
        return bound if self.softcap is None else jnp.minimum(bound, self.softcap)

    def _lengthened(self, norm: RMSNorm, dtype: jnp.dtype) -> Float[Array, "... H/2"]:
        """By how much the gains lengthen each pair at most."""
        gain = jnp.abs(norm.gain(dtype).astype(jnp.float32))
        return jnp.max(gain.reshape(*gain.shape[:-1], 2, -1), axis=-2)
