"""Grouped products on TPUs: Pallas kernels that visit each tile of rows once for each group in it."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.grouped_matmul.tpu import tiles
from kernels.grouped_matmul.tpu.outer import outer
from kernels.grouped_matmul.tpu.products import products


def refusal(x, w, group_sizes, turned) -> str | None:
    """Why these kernels can't do it, None where they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"rows are bfloat16 or float32, found {x.dtype}"
    if 0 in (*x.shape, *w.shape):
        return f"nothing may be empty, found x {x.shape}, w {w.shape}"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    turned: bool,
    chip: tiles.Chip | None = None,
    interpret: bool = False,
):
    """As the reference; `turned`: w is E F D. `chip` and `interpret` are for tests."""
    return _forward(x, w, group_sizes, turned, chip, interpret)[0]


def _forward(x, w, group_sizes, turned, chip, interpret):
    return _products(x, w, group_sizes, turned, chip, interpret), (x, w, group_sizes)


def _backward(turned, chip, interpret, saved, dy):
    x, w, group_sizes = saved
    dy = dy.astype(x.dtype)
    dx = _products(dy, w, group_sizes, not turned, chip, interpret)
    a, b = (dy, x) if turned else (x, dy)
    chip = tiles.this_chip() if chip is None else chip
    sizes = tiles.for_outer(*a.shape, b.shape[1], len(w), x.dtype.itemsize, w.dtype.itemsize, chip)
    return dx, outer(a, b, group_sizes, w.dtype, sizes, chip.memory * 3 // 4, interpret), None


grouped_matmul.defvjp(_forward, _backward)


def _products(x, w, group_sizes, turned, chip, interpret):
    chip = tiles.this_chip() if chip is None else chip
    width = w.shape[1] if turned else w.shape[2]
    sizes = tiles.for_products(*x.shape, width, len(w), x.dtype.itemsize, w.dtype.itemsize, chip)
    return products(x, w, group_sizes, turned, sizes, chip.memory * 3 // 4, interpret)
