"""SigLIP's vision tower (Zhai et al. 2023, arXiv 2303.15343), on packed patches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import Mask, attention
from parsit_jax.models.config import PositionTable, VisionConfig
from vishwamai.models.config import Remat
from vishwamai.models.layers import Carried, Embedding, LayerNorm, Linear, parameter, scan, stack
from vishwamai.models.transformer import ACTIVATION, CHECKPOINT
from vishwamai.parallel.sharding import attention_spec, constrain

XAVIER = initializers.xavier_uniform()


class VisionAttention(nnx.Module):
    """Full self-attention inside each image."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, kind=nnx.Param):
        width = config.hidden_size
        into = dict(axes=("embed", "heads"), rngs=rngs, init=XAVIER, bias=True, kind=kind)
        self.q_proj = Linear(width, width, **into)
        self.k_proj = Linear(width, width, **into)
        self.v_proj = Linear(width, width, **into)
        self.out_proj = Linear(width, width, ("heads", "embed"), rngs=rngs, init=XAVIER, bias=True, kind=kind)
        self.heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "B P D"], mask: Mask) -> Float[Array, "B P D"]:
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = self.q_proj(x).reshape(split), self.k_proj(x).reshape(split), self.v_proj(x).reshape(split)
        return self.out_proj(attention(q, k, v, mask, spec=attention_spec(q, k)).reshape(x.shape))


class VisionMLP(nnx.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, kind=nnx.Param):
        width, inner = config.hidden_size, config.intermediate_size
        self.fc1 = Linear(width, inner, ("embed", "mlp"), rngs=rngs, init=XAVIER, bias=True, kind=kind)
        self.fc2 = Linear(inner, width, ("mlp", "embed"), rngs=rngs, init=XAVIER, bias=True, kind=kind)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class VisionLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each on a residual branch."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, kind=nnx.Param):
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs, kind=kind)
        self.self_attn = VisionAttention(config, rngs=rngs, kind=kind)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs, kind=kind)
        self.mlp = VisionMLP(config, rngs=rngs, kind=kind)

    def __call__(self, x: Float[Array, "B P D"], mask: Mask) -> Float[Array, "B P D"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class PoolingHead(nnx.Module):
    """SigLIP's attention pooling. Documents never use it: its weights are carried for export."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.probe = parameter(rngs, (1, 1, width), (None, None, "embed"), XAVIER, Carried)
        self.in_proj = Linear(width, 3 * width, ("embed", "heads"), rngs=rngs, init=XAVIER, bias=True, kind=Carried)
        self.out_proj = Linear(width, width, ("heads", "embed"), rngs=rngs, init=XAVIER, bias=True, kind=Carried)
        self.layernorm = LayerNorm(width, config.layer_norm_eps, rngs=rngs, kind=Carried)
        self.mlp = VisionMLP(config, rngs=rngs, kind=Carried)


class Embeddings(nnx.Module):
    """Patches and positions -> vectors."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, grid = config.hidden_size, config.grid
        init = initializers.normal(1 / math.sqrt(width))
        self.patch_embedding = Linear(
            config.patch_features, width, ("patch", "embed"), rngs=rngs, init=initializers.lecun_normal(), bias=True
        )
        if config.positions is PositionTable.FACTORISED:
            self.row_embedding = Embedding(grid, width, (None, "embed"), rngs=rngs, init=init)
            self.column_embedding = Embedding(grid, width, (None, "embed"), rngs=rngs, init=init)
        else:
            self.position_embedding = Embedding(grid * grid, width, (None, "embed"), rngs=rngs, init=init)
        self.grid = grid

    def table(self, rows: int, columns: int) -> Float[Array, "rows columns D"]:
        """The position table for a grid of any size, resized as torch's bicubic `interpolate` does."""
        if hasattr(self, "row_embedding"):
            own = self.row_embedding.embedding[...][:, None] + self.column_embedding.embedding[...][None]
        else:
            own = self.position_embedding.embedding[...].reshape(self.grid, self.grid, -1)
        if (rows, columns) == (self.grid, self.grid):
            return own
        vertical, horizontal = bicubic_weights(self.grid, rows), bicubic_weights(self.grid, columns)
        return jnp.einsum("rg,gcd->rcd", vertical, jnp.einsum("ch,ghd->gcd", horizontal, own))

    def __call__(
        self, patches: Float[Array, "B P C"], positions: Int[Array, "B P 2"], grid: tuple[int, int]
    ) -> Float[Array, "B P D"]:
        table = self.table(*grid).reshape(grid[0] * grid[1], -1).astype(patches.dtype)
        return self.patch_embedding(patches) + table[positions[..., 0] * grid[1] + positions[..., 1]]


class SiglipVision(nnx.Module):
    """Patches -> features of the chosen layer (before `post_layernorm`, as LLaVA takes them).

    `feature_layers` is how many layers run; the rest are carried. With `feature_layers=None` all layers and
    `post_layernorm` run: the `last_hidden_state` of `SiglipVisionModel`.
    """

    def __init__(self, config: VisionConfig, feature_layers: int | None = None, *, rngs: nnx.Rngs):
        self.config = config
        self.normalise_output = feature_layers is None
        run = config.num_hidden_layers if feature_layers is None else feature_layers
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = stack(lambda rngs: VisionLayer(config, rngs=rngs), run, rngs)
        if unused := config.num_hidden_layers - run:
            self.unused_layers = stack(lambda rngs: VisionLayer(config, rngs=rngs, kind=Carried), unused, rngs)
        kind = nnx.Param if self.normalise_output else Carried
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs, kind=kind)
        if config.vision_use_head:
            self.head = PoolingHead(config, rngs=rngs)

    def __call__(
        self,
        patches: Array,
        positions: Int[Array, "B P 2"],
        segment_ids: Int[Array, "B P"],
        grid: tuple[int, int],
        dtype=jnp.float32,
        remat: Remat = Remat.NONE,
    ) -> Float[Array, "B P D"]:
        """`patches` B P C: uint8 pixels (normalised here to [-1, 1], SigLIP's mean and deviation 0.5) or floats."""
        if patches.dtype == jnp.uint8:
            patches = patches.astype(jnp.float32) / 127.5 - 1.0
        x = constrain(self.embeddings(patches.astype(dtype), positions, grid), *ACTIVATION)
        mask = Mask(q_segment_ids=segment_ids, kv_segment_ids=segment_ids)
        body = lambda layer, x, _: (constrain(layer(x, mask), *ACTIVATION), None)  # noqa: E731
        x, _ = scan(self.layers, body, x, None, CHECKPOINT[remat])
        return self.post_layernorm(x) if self.normalise_output else x


def bicubic_weights(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Row i holds the weights of the source cells in target cell i: Keys' cubic with a = -0.75, edges repeated,
    half-pixel centres, no antialiasing (torch's `interpolate(mode="bicubic", align_corners=False)`)."""
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for offset in range(-1, 3):
        distance = np.abs(centre - (first + offset))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
        cell = np.clip(first + offset, 0, source - 1)
        np.add.at(weights, (np.arange(target), cell), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)
