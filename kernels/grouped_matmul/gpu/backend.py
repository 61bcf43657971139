"""Grouped products on Hopper GPUs (H100, H200): Pallas kernels in Mosaic's own instructions.

They have never run on a GPU: this project has had none. What is known: numbers and races in Pallas' interpreter, and
ptxas' account of what it compiles for an H100, without spilled registers. What is not: a time, and whatever the
interpreter leaves out (swizzled layouts, products and copies that are still under way when the next step begins).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import hopper, varying
from kernels.backends import left_to_xla
from kernels.grouped_matmul.gpu import ring
from kernels.grouped_matmul.gpu.outer import outer
from kernels.grouped_matmul.gpu.products import products
from kernels.grouped_matmul.quantized import QuantizedMatrices


def refusal(x, matrices, group_sizes, turned, activation) -> str | None:
    """Why these kernels can't do it, None where they can."""
    if left_to_xla():
        return "XLA can't split a kernel over a mesh: call it in a shard_map over rows, with check_vma=False"
    if reason := varying.refusal((x, matrices, group_sizes)):
        return reason
    if reason := hopper.refusal():
        return reason
    w = matrices[0]
    values = w.values if isinstance(w, QuantizedMatrices) else w
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"rows are bfloat16 or float16, found {x.dtype}"
    if values is w and w.dtype != x.dtype:
        return f"matrices are of the rows' type, {x.dtype}, or quantized, found {w.dtype}"
    if 0 in (*x.shape, *values.shape):
        return f"nothing may be empty, found x {x.shape}, w {values.shape}"
    if any(size % ring.DEPTH for size in values.shape[1:]):
        return f"the matrices' sides must be multiples of {ring.DEPTH}, found {values.shape[1:]}"
    return None


def grouped_matmul(
    x: Float[Array, "M D"],
    matrices: tuple[Float[Array, "E D F"], ...],
    group_sizes: Int[Array, " E"],
    turned: bool,
    activation: Callable[[Array], Array] | None,
    blocks: int | None = None,
    interpret=None,
) -> Float[Array, "M F"]:
    """As the reference: one matrix for each group after the other. `blocks`, `interpret`: for tests."""
    blocks = hopper.multiprocessors() if blocks is None else blocks
    found = [_one(x, w, group_sizes, turned, blocks, interpret) for w in matrices]
    return found[0] if activation is None else activation(found[0]) * found[1]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _one(x, w, group_sizes, turned, blocks, interpret):
    return products(x, w, group_sizes, turned, blocks, interpret)


def _forward(x, w, group_sizes, turned, blocks, interpret):
    return products(x, w, group_sizes, turned, blocks, interpret), (x, w, group_sizes)


def _backward(turned, blocks, interpret, saved, dy):
    x, w, group_sizes = saved
    dx = products(dy, w, group_sizes, not turned, blocks, interpret)
    left, right = (dy, x) if turned else (x, dy)
    return dx, outer(left, right, group_sizes, blocks, interpret), None


_one.defvjp(_forward, _backward)
