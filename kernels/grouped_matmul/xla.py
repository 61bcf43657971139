"""Grouped products in plain XLA: loops over the groups' blocks of rows, so that only real rows cost anything.

`lax.ragged_dot` is a dense product with every expert on CPU, and its gradient touches experts without rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 256  # rows of one product: enough to be worth the copy of a matrix, few enough to leave little empty


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, " E"], turned: bool):
    """As the reference; `turned`: w is E F D."""
    return _forward(x, w, group_sizes, turned)[0]


def _forward(x, w, group_sizes, turned):
    return _products(x, w, group_sizes, turned), (x, w, group_sizes)


def _backward(turned, saved, dy):
    x, w, group_sizes = saved
    dy = dy.astype(x.dtype)
    dx = _products(dy, w, group_sizes, not turned).astype(x.dtype)
    dw = _outer(dy, x, group_sizes) if turned else _outer(x, dy, group_sizes)
    return dx, dw.astype(w.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _blocks(rows: int, groups: int) -> int:
    """Rows of one product: a share of the average group when that is small."""
    return max(8, min(BLOCK, 2 ** (rows // max(groups, 1)).bit_length()))


def _products(x, w, group_sizes, turned):
    """x[m] @ w[group of m] (or its transpose): rows in float32, behind the last group 0.

    A loop over the blocks that there are: with few rows, few matrices are read.
    """
    block = _blocks(x.shape[0], w.shape[0])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    width = w.shape[1] if turned else w.shape[2]
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))
    padded = jnp.pad(x, ((0, block), (0, 0)))  # a slice at the end must not be moved
    ends, blocks = jnp.cumsum(group_sizes), jnp.cumsum(-(-group_sizes // block))

    def one_block(i, y):
        group = jnp.sum(blocks <= i)
        start = ends[group] - group_sizes[group] + (i - jnp.where(group > 0, blocks[group - 1], 0)) * block
        matrix = lax.dynamic_index_in_dim(w, group, keepdims=False).astype(x.dtype)
        rows = lax.dynamic_slice_in_dim(padded, start, block)
        product = lax.dot_general(rows, matrix, dimensions, preferred_element_type=wide)
        # What is written behind a group is overwritten by the next one.
        product = jnp.where(start + jnp.arange(block)[:, None] < ends[group], product, 0)
        return lax.dynamic_update_slice_in_dim(y, product, start, 0)

    return lax.fori_loop(0, blocks[-1], one_block, jnp.zeros((x.shape[0] + block, width), wide))[: x.shape[0]]


def _outer(a, b, group_sizes):
    """Sum over the rows of each group of a[m] b[m]^T: E A B in float32; exactly 0 for a group without rows."""
    block = _blocks(a.shape[0], len(group_sizes))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    shape, ends = (a.shape[1], b.shape[1]), jnp.cumsum(group_sizes)
    a, b = (jnp.pad(x, ((0, block), (0, 0))) for x in (a, b))

    def one_group(group, dw):
        first = ends[group] - group_sizes[group]

        def one_block(i, total):
            start = first + i * block
            live = start + jnp.arange(block)[:, None] < ends[group]
            # Both: what stands behind may be anything, also NaN.
            rows, others = (jnp.where(live, lax.dynamic_slice_in_dim(x, start, block), 0) for x in (a, b))
            return total + lax.dot_general(rows, others, (((0,), (0,)), ((), ())), preferred_element_type=wide)

        total = lax.fori_loop(0, -(-group_sizes[group] // block), one_block, jnp.zeros(shape, wide))
        return lax.dynamic_update_index_in_dim(dw, total, group, 0)

    return lax.fori_loop(0, len(group_sizes), one_group, jnp.zeros((len(group_sizes), *shape), wide))
