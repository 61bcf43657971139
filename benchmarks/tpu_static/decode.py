"""Decoding by ours alone: it reads the cache once, and that is what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import kernels
from benchmarks.tpu_static.shapes import Decode
from kernels.decode_attention.quantized import QuantizedVectors
from kernels.static_estimate import Geometry, Kernel


@dataclass(frozen=True)
class OurDecode:
    """`kernels.decode_attention`; every row is as long as its cache, which is the most work."""

    shape: Decode
    name: ClassVar[str] = "ours"
    modules: ClassVar[tuple[str, ...]] = ("kernels.decode_attention", "kernels.attention.mask", "kernels.precision")
    distributions: ClassVar[tuple[str, ...]] = ("jax", "libtpu")

    def missing(self) -> None:
        return None

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        shape = self.shape
        q = jax.ShapeDtypeStruct((shape.B, 1, shape.N, shape.H), jnp.bfloat16)
        cache = jax.ShapeDtypeStruct((shape.B, shape.K, shape.length, shape.H), jnp.dtype(shape.cache))
        if shape.cache == "int8":
            cache = QuantizedVectors(cache, jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32))

        def attend(q, k, v, lengths):
            return kernels.decode_attention(q, k, v, kernels.Mask(causal=True, q_offset=lengths), backend="tpu")

        return attend, (q, cache, cache, jax.ShapeDtypeStruct((shape.B,), jnp.int32))

    def geometry(self, kernel: Kernel, number: int) -> Geometry:
        """A step takes some heads and slots; every query sees all of each block, as the shape says."""
        shape, (_, heads, slots, _) = self.shape, kernel.blocks[1]
        rows = shape.B * shape.K // heads
        visits = rows * -(-shape.length // slots)
        return Geometry((visits, 0), rows=(rows,), steps=visits, hbm_bytes=shape.hbm_bytes)
