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

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        shape = self.shape

        def attend(q, k, v, *ids):
            mask = kernels.Mask(causal=shape.causal, window=shape.window, q_segment_ids=ids[0] if ids else None)
            return kernels.attention(q, k, v, mask, backend="tpu")

        q = jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, shape.H), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((shape.B, shape.T, shape.K, shape.H), jnp.bfloat16)
        ids = (jax.ShapeDtypeStruct((shape.B, shape.T), jnp.int32),) if shape.documents else ()
        return gradient(attend, 3) if self.backward else attend, (q, k, k, *ids)

    def geometry(self, kernel: Kernel, number: int) -> Geometry:
        """Both kernels read q in blocks `1 heads H queries`, k `1 heads keys H`; the backward takes pieces."""
        from kernels.attention.tpu import blocks, tuning

        shape = self.shape
        (_, heads, _, queries), (_, _, keys, _) = kernel.blocks[:2]
        ids = np.broadcast_to(shape.segment_ids, (shape.B, shape.T)) if shape.documents else None
        mask = kernels.Mask(causal=shape.causal, window=shape.window, q_segment_ids=ids)
        if shape.T % keys:
            mask = replace(mask, kv_length=shape.T)
        extent = blocks.Extent(shape.T, shape.T, queries, keys)
        each, first_pass = shape.N // heads, ()
        if kernel.name == "attention_backward":
            extent, first_pass = tuning.pieces(extent, 2 * shape.H)[number], (shape.B * shape.K,)
        plan = blocks.plan(mask, extent)
        entries = np.broadcast_to(plan.table, (shape.B, np.shape(plan.table)[1]))
        runs = tuple(each * int((entries & 3 == kind).sum()) for kind in sorted(plan.kinds - {blocks.NOTHING}))
        opened = each * int((entries & blocks.FIRST != 0).sum())
        rows = (*first_pass, opened) if first_pass else opened
        return Geometry(runs, rows, steps=each * shape.B * int(plan.visits))


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
        geometry = shape.geometry(sizes.rows, shape.D, sizes.columns)
        return replace(geometry, bodies=(left,), steps=visits, trips=(float(whole.mean()),))
