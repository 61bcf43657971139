"""Grouped products on TPUs: Pallas kernels that visit each tile of rows once for each group in it."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.backends import left_to_xla, target
from kernels.grouped_matmul.quantized import QuantizedMatrices
from kernels.grouped_matmul.tpu import tiles
from kernels.grouped_matmul.tpu.outer import outer
from kernels.grouped_matmul.tpu.products import products


def refusal(x, w, group_sizes, turned) -> str | None:
    """Why these kernels can't do it, None where they can."""
    if (platform := target()) != "tpu":
        return f"it is for TPUs, not for {platform}"
    if left_to_xla():
        return "XLA can't split a kernel over a mesh: call it in a shard_map over rows"
    values = w.values if isinstance(w, QuantizedMatrices) else w
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"rows are bfloat16 or float32, found {x.dtype}"
    if values is w and w.dtype not in (jnp.bfloat16, jnp.float32):
        return f"matrices are bfloat16, float32 or quantized, found {w.dtype}"
    if 0 in (*x.shape, *values.shape):
        return f"nothing may be empty, found x {x.shape}, w {values.shape}"
    if None in _tiles(x, values, turned, tiles.this_chip()):
        return f"x {x.shape} and w {values.shape} need more memory than the chip has for blocks of 128 columns"
    return None


def _tiles(x, values, turned, chip) -> tuple[tiles.Tiles | None, ...]:
    """Of the product, of the rows' gradient and of the matrices'; None: does not fit."""
    rows, groups, (inner, width) = len(x), len(values), values.shape[:0:-1] if turned else values.shape[1:]
    sizes = groups, x.dtype.itemsize, values.dtype.itemsize, chip
    left, right = (width, inner) if turned else (inner, width)
    return (
        tiles.for_products(rows, inner, width, *sizes),
        tiles.for_products(rows, width, inner, *sizes),
        tiles.for_outer(rows, left, right, *sizes),
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"] | QuantizedMatrices,
    group_sizes: Int[Array, " E"],
    turned: bool,
    chip: tiles.Chip | None = None,
    interpret: bool = False,
):
    """As the reference; `turned`: w is E F D. `chip` and `interpret` are for tests."""
    return _forward(x, w, group_sizes, turned, chip, interpret)[0]


def _forward(x, w, group_sizes, turned, chip, interpret):
    values, scales = (w.values, w.spread(turned)) if isinstance(w, QuantizedMatrices) else (w, None)
    chip = tiles.this_chip() if chip is None else chip
    sizes = _tiles(x, values, turned, chip)[0]
    y = products(x, values, scales, group_sizes, turned, sizes, _limit(chip), interpret)
    return y, (x, values, scales, group_sizes)


def _backward(turned, chip, interpret, saved, dy):
    x, w, scales, group_sizes = saved
    dy = dy.astype(x.dtype)
    chip = tiles.this_chip() if chip is None else chip
    _, of_rows, of_matrices = _tiles(x, w, turned, chip)
    dx = products(dy, w, scales, group_sizes, not turned, of_rows, _limit(chip), interpret)
    if scales is not None:
        return dx, None, None
    a, b = (dy, x) if turned else (x, dy)
    return dx, outer(a, b, group_sizes, w.dtype, of_matrices, _limit(chip), interpret), None


def _limit(chip: tiles.Chip) -> int:
    """Bytes that a kernel may take: its blocks, and what the compiler needs beside them."""
    return chip.memory * 3 // 4


grouped_matmul.defvjp(_forward, _backward)
