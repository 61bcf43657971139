"""Parsit: SigLIP tower -> projector -> decoder. Only the embeddings differ from a text model's."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from kernels import Mask
from parsit_jax.models.config import ImageMask, ParsitConfig, Pooling
from parsit_jax.models.siglip import SiglipVision
from vishwamai.data.batch import Batch
from vishwamai.models.config import Remat
from vishwamai.models.layers import Linear
from vishwamai.models.transformer import Decoded, Transformer


class Projector(nnx.Module):
    """`linear`, or `mlpNx_gelu`: N linear layers with GELU between them (LLaVA's names)."""

    def __init__(self, config: ParsitConfig, *, rngs: nnx.Rngs):
        width, init = config.text.hidden_size, initializers.lecun_normal()
        self.depth = config.projector_layers
        for i in range(1, self.depth + 1):
            given = config.vision.hidden_size if i == 1 else width
            axes = ("embed", "mlp") if i % 2 else ("mlp", "embed")
            setattr(self, f"linear_{i}", Linear(given, width, axes, rngs=rngs, init=init, bias=True))

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P E"]:
        for i in range(1, self.depth + 1):
            x = getattr(self, f"linear_{i}")(x)
            x = jax.nn.gelu(x, approximate=False) if i < self.depth else x
        return x


class ParsitModel(nnx.Module):
    """A document model. `grid` of its methods is the (rows, columns) of patches that every image of a batch has."""

    def __init__(self, config: ParsitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision_tower = SiglipVision(config.vision, config.feature_layers, rngs=rngs)
        self.multi_modal_projector = Projector(config, rngs=rngs)
        self.language_model = Transformer(config.text, rngs=rngs)

    def image_features(self, batch: Batch, dtype=jnp.float32, remat: Remat = Remat.NONE) -> Float[Array, "B Q D"]:
        """Projected features; Q is P, or P/4 with pooling (features then stand in row-major order of 2x2 blocks)."""
        grid = self.grid(batch)
        x = self.vision_tower(batch.patches, batch.patch_positions, batch.patch_segment_ids, grid, dtype, remat)
        if self.config.pooling is Pooling.AVERAGE_2X2:
            x = pool_2x2(x, grid)
        return self.multi_modal_projector(x)

    def grid(self, batch: Batch) -> tuple[int, int]:
        return batch.grid or (self.config.vision.grid, self.config.vision.grid)

    def embed(self, batch: Batch, dtype=jnp.float32, remat: Remat = Remat.NONE) -> Float[Array, "B T D"]:
        words = self.language_model.embed(batch, dtype)
        if batch.patches is None:
            return words
        features = self.image_features(batch, dtype, remat)
        index = batch.feature_index
        placed = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where((index >= 0)[..., None], placed, words)

    def mask(self, batch: Batch) -> Mask:
        """Causal inside each example; with `image_mask: prefix` an image also sees all of itself."""
        blocks = None
        if self.config.image_mask is ImageMask.PREFIX and batch.patches is not None:
            share = batch.patches.shape[1] // self.features_per_row(batch)
            owner = batch.patch_segment_ids[:, ::share]
            image = jnp.take_along_axis(owner, jnp.maximum(batch.feature_index, 0), axis=1)
            blocks = jnp.where(batch.feature_index >= 0, image, 0)
        ids = batch.segment_ids
        return Mask(causal=True, q_segment_ids=ids, kv_segment_ids=ids, block_ids=blocks)

    def features_per_row(self, batch: Batch) -> int:
        return batch.patches.shape[1] // (4 if self.config.pooling is Pooling.AVERAGE_2X2 else 1)

    def decoded(self, batch: Batch, dtype=jnp.float32, remat: Remat = Remat.NONE, **options: Any) -> Decoded:
        """Options as the decoder's: drops, softmax."""
        x = self.embed(batch, dtype, remat)
        return self.language_model.decoder(x, batch.positions, self.mask(batch), remat=remat, **options)

    def hidden_states(self, batch: Batch, dtype=jnp.float32, remat: Remat = Remat.NONE) -> Float[Array, "B T D"]:
        return self.decoded(batch, dtype, remat).hidden

    def unembed(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return self.language_model.unembed(x)


def pool_2x2(x: Float[Array, "B P D"], grid: tuple[int, int]) -> Float[Array, "B Q D"]:
    """Mean over 2x2 neighbours of every image; P must be a multiple of rows x columns, both even."""
    rows, columns = grid
    if rows % 2 or columns % 2:
        raise ValueError(f"2x2 pooling needs an even patch grid, found {rows} x {columns}: change image or patch size")
    blocks = x.reshape(x.shape[0], -1, rows // 2, 2, columns // 2, 2, x.shape[-1])
    return blocks.mean(axis=(3, 5)).reshape(x.shape[0], -1, x.shape[-1])
