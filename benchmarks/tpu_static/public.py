"""The public TPU kernels, each in the settings that are known to serve it best."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tpu_static.shapes import Attention, Experts
from kernels.static_estimate import Geometry, Kernel

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

    @property
    def name(self) -> str:
        return f"{self.package} splash {self.block}/{self.compute}{' lp' if self.lp_scheduler else ''}"

    def missing(self) -> str | None:
        return _missing(self.package)

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
class RaggedDot:
    """A grouped product by megablox (JAX's), tokamax's descendant of it, or XLA, which picks its tiles itself."""

    package: str
    shape: Experts
    tiles: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.package} {'x'.join(map(str, self.tiles))}" if self.tiles else self.package

    def missing(self) -> str | None:
        return _missing("tokamax") if self.package == "tokamax" else None

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        shape = self.shape
        x = jax.ShapeDtypeStruct((shape.M, shape.D), jnp.bfloat16)
        w = jax.ShapeDtypeStruct((shape.E, shape.D, shape.F), jnp.bfloat16)
        return self._multiply, (x, w, jax.ShapeDtypeStruct((shape.E,), jnp.int32))

    def _multiply(self, x, w, group_sizes):
        if self.package == "lax.ragged_dot":
            return jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=x.dtype)
        if self.package == "megablox":
            from jax.experimental.pallas.ops.tpu.megablox import gmm

            return gmm(x, w, group_sizes, x.dtype, self.tiles)
        from tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel import gmm

        precision = jax.lax.Precision.DEFAULT
        return gmm(x, w, group_sizes, precision=precision, out_dtype=x.dtype, tiling=self.tiles)

    def geometry(self, kernel: Kernel, number: int) -> Geometry | None:
        if kernel.name == "ragged-dot-metadata":
            return None
        tiles = self.tiles or tuple(map(int, kernel.attributes["ragged_dot_tiling"].split(",")))
        return self.shape.geometry(*tiles)


def _missing(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} can't be imported ({error})"
    return None


def splash_settings(shape: Attention, backward: bool) -> tuple[Splash, ...]:
    settings = (
        ("jax", 1024, 512, False),
        ("jax", 512, 512, False),
        ("tokamax", 1024, 512, False),
        ("tokamax", 1024, 512, True),
        ("tokamax", 1024, 256, False),
        ("tokamax", 512, 512, False),
    )
    return tuple(Splash(package, block, shape, backward, keys, lp) for package, block, keys, lp in settings)


def grouped_settings(shape: Experts) -> tuple[RaggedDot, ...]:
    tiled = [(package, tile) for package in ("megablox", "tokamax") for tile in (128, 256, 512)]
    return (
        RaggedDot("lax.ragged_dot", shape),
        *(RaggedDot(package, shape, (tile, shape.D, shape.F)) for package, tile in tiled),
    )
