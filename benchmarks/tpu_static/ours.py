"""Our TPU kernels in the same cases. How often their parts run is asked of the plans that they use themselves."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from benchmarks.tpu_static.public import gradient
from benchmarks.tpu_static.shapes import Attention, Experts
from kernels.static_estimate import Geometry, Kernel
from kernels.static_estimate.attention import attention_geometry
from kernels.static_estimate.estimate import grid_step


def _missing(kernel: str) -> str | None:
    api = importlib.import_module(f"kernels.{kernel}.api")
    return None if "tpu" in api.BACKENDS else f"kernels.{kernel} has no backend for TPUs"


@dataclass(frozen=True)
class OurAttention:
    """`kernels.attention`, layout B T N H; what XLA does to lay that out for the kernels is not counted."""

    shape: Attention
    backward: bool
    name: ClassVar[str] = "ours"

    def missing(self) -> str | None:
        return _missing("attention")

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
        return attention_geometry(kernel, number, q, k, k, self._mask(ids))


@dataclass(frozen=True)
class OurExperts:
    """`kernels.grouped_matmul`: a visit multiplies its expert's rows of the tile, some at a time, and what is left."""

    shape: Experts
    name: ClassVar[str] = "ours"

    def missing(self) -> str | None:
        return _missing("grouped_matmul")

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        shape = self.shape
        x = jax.ShapeDtypeStruct((shape.M, shape.D), jnp.bfloat16)
        w = jax.ShapeDtypeStruct((shape.E, shape.D, shape.F), jnp.bfloat16)
        sizes = jax.ShapeDtypeStruct((shape.E,), jnp.int32)
        return lambda x, w, sizes: kernels.grouped_matmul(x, w, sizes, backend="tpu"), (x, w, sizes)

    def geometry(self, kernel: Kernel, number: int) -> Geometry:
        from kernels.grouped_matmul.tpu import tiles

        shape = self.shape
        sizes = tiles.for_products(shape.M, shape.D, shape.F, shape.E, 2, 2, tiles.this_chip())
        lengths = shape.rows_of_visits(sizes.rows, tiles.ALIGNMENT)
        whole = (lengths + sizes.product // 2 - 1) // sizes.product
        parts = -(-shape.F // sizes.columns)
        visits, left = parts * len(lengths), parts * int((lengths > whole * sizes.product).sum())
        geometry = replace(shape.geometry(sizes.rows, shape.D, sizes.columns), steps=visits)
        if len(grid_step(kernel.bundles).bodies) == 1:
            return replace(geometry, bodies=(left,), trips=(float(whole.mean()),))
        # Some chips' compiler asks first whether the loop over whole products runs at all.
        entered = parts * int((whole > 0).sum())
        return replace(geometry, bodies=(entered, left), trips=(float(whole[whole > 0].mean()),))
