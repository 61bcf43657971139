"""Attention: JAX's and tokamax's splash kernels in the settings that are known to serve them best, and ours."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from benchmarks.tpu_static.measure import without
from benchmarks.tpu_static.shapes import Attention
from kernels.static_estimate import Geometry, Kernel
from kernels.static_estimate.attention import attention_geometry

MODULES = {
    "jax": "jax.experimental.pallas.ops.tpu.splash_attention",
    "tokamax": "tokamax._src.ops.experimental.tpu.splash_attention",
}
LANES = 128


def gradient(function: Callable, arguments: int) -> Callable:
    """Of the sum of what `function` gives, with respect to its first arguments."""

    def total(*args):
        return function(*args).astype(jnp.float32).sum()

    return jax.grad(total, argnums=tuple(range(arguments)))


@dataclass(frozen=True)
class Splash:
    """Splash attention by JAX or by tokamax, in blocks of `block` by `block`, `compute` keys at a time; fused backward.

    Layout B N T H, which is the kernels' own. Neither takes queries or keys that are no whole number of blocks: 729 are
    padded, and the padding is a segment of its own. Segment ids hide keys, they save no block.
    """

    package: str
    block: int
    shape: Attention
    backward: bool
    compute: int = 512
    lp_scheduler: bool = False
    modules: ClassVar[tuple[str, ...]] = ()

    @property
    def distributions(self) -> tuple[str, ...]:
        return "jax", "libtpu", *(("tokamax",) if self.package == "tokamax" else ())

    @property
    def name(self) -> str:
        return f"{self.package} splash {self.block}/{self.compute}{' lp' if self.lp_scheduler else ''}"

    def missing(self) -> str | None:
        return without(self.package)

    @property
    def _padded(self) -> Attention:
        size = min(self.block, -(-self.shape.T // LANES) * LANES)
        length = -(-self.shape.T // size) * size
        if length == self.shape.T:
            return self.shape
        return replace(self.shape, T=length, documents=(self.shape.T, length - self.shape.T))

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        shape = self._padded
        splash = importlib.import_module(f"{MODULES[self.package]}.splash_attention_kernel")
        masks = importlib.import_module(f"{MODULES[self.package]}.splash_attention_mask")
        size = (shape.T, shape.T)
        mask = masks.CausalMask(size) if shape.causal else masks.FullMask(size)
        if shape.window is not None:
            mask = masks.LocalMask(size, (shape.window - 1, 0), 0)
        block, compute = min(self.block, shape.T), min(self.compute, shape.T)
        compute = compute if block % compute == 0 else block
        sizes = dict(block_q=block, block_kv=block, block_kv_compute=compute)
        sizes |= dict(block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=compute)

        def attend(q, k, v, *ids):
            with jax.ensure_compile_time_eval():
                if self.package == "jax":
                    heads = masks.MultiHeadMask([mask] * shape.N)
                    blocks = splash.BlockSizes(**sizes, use_fused_bwd_kernel=True)
                    kernel = splash.make_splash_mha(heads, head_shards=1, q_seq_shards=1, block_sizes=blocks)
                else:
                    config = splash.SplashConfig(**sizes, use_experimental_scheduler=self.lp_scheduler)
                    kernel = splash.make_splash_mha(mask, config=config, q_seq_shards=1)
            if not ids:
                return jax.vmap(kernel)(q, k, v)
            return jax.vmap(lambda q, k, v, i: kernel(q, k, v, splash.SegmentIds(i, i)))(q, k, v, *ids)

        q = jax.ShapeDtypeStruct((shape.B, shape.N, shape.T, shape.H), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((shape.B, shape.K, shape.T, shape.H), jnp.bfloat16)
        ids = (jax.ShapeDtypeStruct((shape.B, shape.T), jnp.int32),) if shape.documents else ()
        return gradient(attend, 3) if self.backward else attend, (q, k, k, *ids)

    def geometry(self, kernel: Kernel, number: int) -> Geometry:
        shape = replace(self._padded, documents=())
        block = min(self.block, shape.T)
        geometry = shape.geometry(block, block, rows_of="keys" if "dkv" in kernel.name else "queries")
        dense = kernel.grid is not None and None not in kernel.grid
        return geometry if dense else replace(geometry, steps=sum(geometry.bodies))


@dataclass(frozen=True)
class OurAttention:
    """`kernels.attention`, layout B T N H; what XLA does to lay that out for the kernels is not counted."""

    shape: Attention
    backward: bool
    name: ClassVar[str] = "ours"
    modules: ClassVar[tuple[str, ...]] = ("kernels.attention", "kernels.precision", "kernels.static_estimate.attention")
    distributions: ClassVar[tuple[str, ...]] = ("jax", "libtpu")

    def missing(self) -> None:
        return None

    def _arrays(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        shape = self.shape
        q = jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, shape.H), jnp.bfloat16)
        return q, jax.ShapeDtypeStruct((shape.B, shape.T, shape.K, shape.H), jnp.bfloat16)

    def _mask(self, segment_ids) -> kernels.Mask:
        return kernels.Mask(causal=self.shape.causal, window=self.shape.window, q_segment_ids=segment_ids)

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        def attend(q, k, v, *ids):
            return kernels.attention(q, k, v, self._mask(*ids or (None,)), backend="tpu")

        (q, k), shape = self._arrays(), self.shape
        ids = (jax.ShapeDtypeStruct((shape.B, shape.T), jnp.int32),) if shape.documents else ()
        return gradient(attend, 3) if self.backward else attend, (q, k, k, *ids)

    def geometry(self, kernel: Kernel, number: int) -> Geometry:
        (q, k), shape = self._arrays(), self.shape
        ids = np.broadcast_to(shape.segment_ids, (shape.B, shape.T)) if shape.documents else None
        return attention_geometry(kernel, q, k, k, self._mask(ids))


def splash_settings(shape: Attention, backward: bool) -> tuple[Splash, ...]:
    """JAX's never wins where tokamax is; small blocks only where the mask hides parts of large ones."""
    settings = [
        ("jax", 1024, 512, False),
        ("tokamax", 1024, 512, False),
        ("tokamax", 1024, 512, True),
        ("tokamax", 1024, 256, False),
        ("tokamax", 1024, 256, True),
    ]
    if shape.window is not None or shape.documents or shape.T % 1024:
        settings += [("tokamax", 512, 512, False)]
    return tuple(Splash(package, block, shape, backward, keys, lp) for package, block, keys, lp in settings)
