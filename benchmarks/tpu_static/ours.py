"""Our TPU kernels in the same cases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import kernels
from benchmarks.tpu_static.public import gradient
from benchmarks.tpu_static.shapes import Attention, Experts
from kernels.static_estimate import Geometry, Kernel


@dataclass(frozen=True)
class OurAttention:
    """`kernels.attention`, layout B T N H: what its TPU backend turns to heads first is XLA's work and not counted."""

    shape: Attention
    backward: bool
    name = "ours"

    def missing(self) -> str | None:
        from kernels.attention.api import BACKENDS

        return None if "tpu" in BACKENDS else "kernels.attention has no TPU backend yet"

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        shape = self.shape

        def attend(q, k, v, *ids):
            mask = kernels.Mask(causal=shape.causal, window=shape.window, q_segment_ids=ids[0] if ids else None)
            return kernels.attention(q, k, v, mask, backend="tpu")

        q = jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, shape.H), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((shape.B, shape.T, shape.K, shape.H), jnp.bfloat16)
        ids = (jax.ShapeDtypeStruct((shape.B, shape.T), jnp.int32),) if shape.documents else ()
        return gradient(attend, 3) if self.backward else attend, (q, k, k, *ids)

    def geometry(self, kernel: Kernel) -> Geometry | None:
        raise NotImplementedError


@dataclass(frozen=True)
class OurExperts:
    shape: Experts
    name = "ours"

    def missing(self) -> str | None:
        from kernels.grouped_matmul.api import BACKENDS

        return None if "tpu" in BACKENDS else "kernels.grouped_matmul has no TPU backend yet"

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        shape = self.shape
        x = jax.ShapeDtypeStruct((shape.M, shape.D), jnp.bfloat16)
        w = jax.ShapeDtypeStruct((shape.E, shape.D, shape.F), jnp.bfloat16)
        sizes = jax.ShapeDtypeStruct((shape.E,), jnp.int32)
        return lambda x, w, sizes: kernels.grouped_matmul(x, w, sizes, backend="tpu"), (x, w, sizes)

    def geometry(self, kernel: Kernel) -> Geometry | None:
        raise NotImplementedError
