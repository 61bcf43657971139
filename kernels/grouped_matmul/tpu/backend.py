"""Grouped products on TPUs: Pallas kernels that visit each tile of rows once for each group in it."""

from collections.abc import Callable
from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import varying
from kernels.backends import left_to_xla
from kernels.grouped_matmul.quantized import QuantizedMatrices
from kernels.grouped_matmul.tpu import tiles
from kernels.grouped_matmul.tpu.outer import outer
from kernels.grouped_matmul.tpu.products import products

Matrices = tuple[Float[Array, "E D F"] | QuantizedMatrices, ...]


def refusal(x, matrices: Matrices, group_sizes, turned, activation) -> str | None:
    """Why these kernels can't do it, None where they can."""
    if left_to_xla():
        return "XLA can't split a kernel over a mesh: call it in a shard_map over rows, with check_vma=False"
    if reason := varying.refusal((x, matrices, group_sizes)):
        return reason
    w = matrices[0]
    values = w.values if isinstance(w, QuantizedMatrices) else w
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"rows are bfloat16 or float32, found {x.dtype}"
    if values is w and w.dtype not in (jnp.bfloat16, jnp.float32):
        return f"matrices are bfloat16, float32 or quantized, found {w.dtype}"
    if 0 in (*x.shape, *values.shape):
        return f"nothing may be empty, found x {x.shape}, w {values.shape}"
    if None in _tiles(x, values, len(matrices), turned, tiles.this_chip()):
        return f"x {x.shape} and w {values.shape} need more memory than the chip has for blocks of 128 columns"
    return None


def _tiles(x, values, count: int, turned: bool, chip: tiles.Chip) -> tuple[tiles.Tiles | None, ...]:
    """Of the products with `count` matrices, of the rows' gradient and of the matrices'; None: does not fit."""
    rows, groups, (inner, width) = len(x), len(values), values.shape[:0:-1] if turned else values.shape[1:]
    sizes = groups, x.dtype.itemsize, values.dtype.itemsize, chip
    left, right = (width, inner) if turned else (inner, width)
    return (
        tiles.for_products(rows, inner, width, *sizes, matrices=count, outputs=_outputs(count)),
        tiles.for_products(rows, width, inner, *sizes, xs=count, matrices=count),
        tiles.for_outer(rows, left, right, *sizes, lefts=count if turned else 1, rights=1 if turned else count),
    )


def _outputs(count: int) -> int:
    """Of the forward kernel where there will be a gradient: what is combined of several products needs them again."""
    return 1 if count == 1 else 1 + count


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def grouped_matmul(
    x: Float[Array, "M D"],
    matrices: Matrices,
    group_sizes: Int[Array, " E"],
    turned: bool,
    activation: Callable[[Array], Array] | None,
    chip: tiles.Chip | None = None,
    interpret: bool = False,
):
    """As the reference: of one matrix for each group, or of two with an activation. `chip`, `interpret`: for tests."""
    return _run(x, _stored(matrices, turned), group_sizes, turned, activation, 1, chip, interpret)[0]


def _stored(matrices: Matrices, turned: bool) -> tuple[tuple[Array, ...], ...]:
    """Each as its values and what they are multiplied by."""
    return tuple((w.values, w.spread(turned)) if isinstance(w, QuantizedMatrices) else (w,) for w in matrices)


def _run(x, stored, group_sizes, turned, activation, outputs, chip, interpret):
    def combine(*found):
        return found if activation is None else (activation(found[0]) * found[1], *found)[:outputs]

    chip = tiles.this_chip() if chip is None else chip
    sizes = _tiles(x, stored[0][0], len(stored), turned, chip)[0]
    return products((x,), stored, group_sizes, turned, combine, outputs, sizes, _limit(chip), interpret)


def _forward(x, matrices, group_sizes, turned, activation, chip, interpret):
    """The products that an activation combines are kept: to make them again is twice the work of the whole forward,
    to write and read them a tenth of its time on a v5e."""
    stored = _stored(matrices, turned)
    y, *kept = _run(x, stored, group_sizes, turned, activation, _outputs(len(stored)), chip, interpret)
    return y, (x, stored, group_sizes, kept)


def _backward(turned, activation, chip, interpret, saved, dy):
    x, stored, group_sizes, kept = saved
    if activation is None:
        each = (dy.astype(x.dtype),)
    else:
        wide = (product.astype(jnp.float32) for product in kept)
        _, back = jax.vjp(lambda gate, up: activation(gate) * up, *wide)
        each = tuple(gradient.astype(x.dtype) for gradient in back(dy.astype(jnp.float32)))
    chip = tiles.this_chip() if chip is None else chip
    values = stored[0][0]
    _, of_rows, of_matrices = _tiles(x, values, len(stored), turned, chip)
    (dx,) = products(
        each, stored, group_sizes, not turned, lambda *found: (reduce(add, found),), 1, of_rows, _limit(chip), interpret
    )
    if len(stored[0]) > 1:
        return dx, None, None
    sides = (each, (x,)) if turned else ((x,), each)
    return dx, tuple(outer(*sides, group_sizes, values.dtype, of_matrices, _limit(chip), interpret)), None


def _limit(chip: tiles.Chip) -> int:
    """Bytes that a kernel may take: its blocks, and what the compiler needs beside them."""
    return chip.memory * 3 // 4


grouped_matmul.defvjp(_forward, _backward)
