"""Products of experts and their gradients: megablox (JAX's), tokamax's descendant of it, XLA's own, and ours."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import kernels
from benchmarks.tpu_static.measure import without
from benchmarks.tpu_static.shapes import Experts
from kernels.static_estimate import Geometry, Kernel
from kernels.static_estimate.grouped_matmul import grouped_matmul_geometry

PRODUCTS = ("forward", "dx", "dW")


def arrays(shape: Experts) -> tuple[jax.ShapeDtypeStruct, ...]:
    """x, w, group_sizes, and dy where a gradient is asked for."""
    x = jax.ShapeDtypeStruct((shape.M, shape.D), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((shape.E, shape.D, shape.F), jnp.bfloat16)
    dy = jax.ShapeDtypeStruct((shape.M, shape.F), jnp.bfloat16)
    return x, w, jax.ShapeDtypeStruct((shape.E,), jnp.int32), dy


def differentiated(multiply: Callable, product: str) -> Callable:
    """Of (x, w, group_sizes, dy): the product, or one of its gradients; what that does not need is not computed."""

    def run(x, w, group_sizes, dy):
        y, pull = jax.vjp(lambda x, w: multiply(x, w, group_sizes), x, w)
        return y if product == "forward" else pull(dy)[PRODUCTS.index(product) - 1]

    return run


@dataclass(frozen=True)
class RaggedDot:
    """One of the public ones. tiles: rows, then D and F, or what takes their places; XLA picks its own."""

    package: str
    shape: Experts
    product: str
    tiles: tuple[int, int, int] | None = None
    modules: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return f"{self.package} {'x'.join(map(str, self.tiles))}" if self.tiles else self.package

    @property
    def distributions(self) -> tuple[str, ...]:
        return "jax", "libtpu", *(("tokamax",) if self.package == "tokamax" else ())

    def missing(self) -> str | None:
        return without("tokamax") if self.package == "tokamax" else None

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        if self.package == "lax.ragged_dot":

            def multiply(x, w, group_sizes):
                return jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=x.dtype)

            return differentiated(multiply, self.product), arrays(self.shape)
        return self._by_pallas, arrays(self.shape)

    def _by_pallas(self, x, w, group_sizes, dy):
        """Each product by its kernel: megablox's own gradient would take one tiling for all."""
        if self.package == "megablox":
            module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
            options = dict(preferred_element_type=x.dtype, tiling=self.tiles)
        else:
            module = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel")
            options = dict(out_dtype=x.dtype, precision=jax.lax.Precision.DEFAULT, tiling=self.tiles)
        if self.product == "dW":
            return module.tgmm(x.swapaxes(0, 1), dy, group_sizes, **options)
        if self.product == "dx":
            return module.gmm(dy, w, group_sizes, transpose_rhs=True, **options)
        return module.gmm(x, w, group_sizes, **options)

    def geometry(self, kernel: Kernel, number: int) -> Geometry | None:
        if kernel.name == "ragged-dot-metadata":
            return None
        tiles = self.tiles or tuple(map(int, kernel.attributes["ragged_dot_tiling"].split(",")))
        if self.product == "dW":
            return self.shape.outer_geometry(*tiles)
        return (self.shape.turned if self.product == "dx" else self.shape).geometry(*tiles)


@dataclass(frozen=True)
class OurExperts:
    """`kernels.grouped_matmul`."""

    shape: Experts
    product: str
    name: ClassVar[str] = "ours"
    modules: ClassVar[tuple[str, ...]] = (
        "kernels.grouped_matmul",
        "kernels.precision",
        "kernels.static_estimate.grouped_matmul",
    )
    distributions: ClassVar[tuple[str, ...]] = ("jax", "libtpu")

    def missing(self) -> None:
        return None

    def program(self) -> tuple[Callable, tuple[Any, ...]]:
        def multiply(x, w, group_sizes):
            return kernels.grouped_matmul(x, w, group_sizes, backend="tpu")

        return differentiated(multiply, self.product), arrays(self.shape)

    def geometry(self, kernel: Kernel, number: int) -> Geometry:
        x, w, *_ = arrays(self.shape)
        return grouped_matmul_geometry(kernel, x, w, self.shape.group_sizes(), self.product == "dx")


def grouped_settings(shape: Experts, product: str) -> tuple[RaggedDot, ...]:
    """Tiles that take all of D and F; the gradient of the matrices keeps those in memory, on some chips only half.

    XLA multiplies rows by a kernel, and makes the gradient of the matrices without one.
    """
    D, F = (shape.F, shape.D) if product == "dx" else (shape.D, shape.F)
    tiles = [(128, D, F), (256, D, F), (512, D, F)]
    if product == "dW":
        tiles += [(256, D // 2, F), (512, D // 2, F)]
    by_xla = () if product == "dW" else (RaggedDot("lax.ragged_dot", shape, product),)
    tiled = (RaggedDot(package, shape, product, tile) for package in ("megablox", "tokamax") for tile in tiles)
    return *by_xla, *tiled
