"""Grouped products in plain XLA: one loop over the groups' blocks of rows, so that only real rows cost anything.

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


def _loop(group_sizes: Int[Array, " E"], block: int, begin, piece, end, carry):
    """For every group: `begin(group)`, then `piece(carry, state, start, stop)` of each of its blocks, then `end`."""
    ends = jnp.cumsum(group_sizes)

    def one_group(group, carry):
        start, stop = ends[group] - group_sizes[group], ends[group]
        count = (group_sizes[group] + block - 1) // block
        state = begin(group)
        body = lambda i, both: piece(*both, start + i * block, stop)  # noqa: E731
        carry, state = lax.fori_loop(0, count, body, (carry, state))
        return end(carry, state, group)

    return lax.fori_loop(0, len(group_sizes), one_group, carry)


def _products(x, w, group_sizes, turned):
    """x[m] @ w[group of m] (or its transpose): rows in float32, behind the last group 0."""
    block = _blocks(x.shape[0], w.shape[0])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    width = w.shape[1] if turned else w.shape[2]
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))
    padded = jnp.pad(x, ((0, block), (0, 0)))  # a slice at the end must not be moved

    def piece(y, matrix, start, stop):
        rows = lax.dynamic_slice_in_dim(padded, start, block)
        product = lax.dot_general(rows, matrix, dimensions, preferred_element_type=wide)
        # What is written behind a group is overwritten by the next one.
        product = jnp.where(start + jnp.arange(block)[:, None] < stop, product, 0)
        return lax.dynamic_update_slice_in_dim(y, product, start, 0), matrix

    begin = lambda group: lax.dynamic_index_in_dim(w, group, keepdims=False).astype(x.dtype)  # noqa: E731
    y = jnp.zeros((x.shape[0] + block, width), wide)
    return _loop(group_sizes, block, begin, piece, lambda y, *_: y, y)[: x.shape[0]]


def _outer(a, b, group_sizes):
    """Sum over the rows of each group of a[m] b[m]^T: E A B in float32; exactly 0 for a group without rows."""
    block = _blocks(a.shape[0], len(group_sizes))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    shape = (a.shape[1], b.shape[1])
    a, b = (jnp.pad(x, ((0, block), (0, 0))) for x in (a, b))

    def piece(carry, total, start, stop):
        live = start + jnp.arange(block)[:, None] < stop
        # Both: what stands behind may be anything, also NaN.
        rows, others = (jnp.where(live, lax.dynamic_slice_in_dim(x, start, block), 0) for x in (a, b))
        return carry, total + lax.dot_general(rows, others, (((0,), (0,)), ((), ())), preferred_element_type=wide)

    def end(dw, total, group):
        return lax.dynamic_update_index_in_dim(dw, total, group, 0)

    dw = jnp.zeros((len(group_sizes), *shape), wide)
    return _loop(group_sizes, block, lambda group: jnp.zeros(shape, wide), piece, end, dw)
