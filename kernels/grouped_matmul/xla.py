"""Grouped products in plain XLA: loops over the groups' blocks of rows, so that only real rows cost anything.

`lax.ragged_dot` is a dense product with every expert on CPU, and its gradient touches experts without rows.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.precision import precision
from kernels.varying import alike

# Rows of one product: in a large group, enough to be worth the copy of a matrix; its rest is done in smaller ones.
BLOCKS = (1024, 256, 64)


def grouped_matmul(
    x: Float[Array, "M D"],
    matrices: tuple[Float[Array, "E D F"], ...],
    group_sizes: Int[Array, " E"],
    turned: bool,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "M F"]:
    """As the reference: one matrix for each group after the other."""
    found = [_one(x, w, group_sizes, turned).astype(x.dtype) for w in matrices]
    return found[0] if activation is None else activation(found[0]) * found[1]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _one(x, w, group_sizes, turned):
    return _forward(x, w, group_sizes, turned)[0]


def _forward(x, w, group_sizes, turned):
    return _products(x, w, group_sizes, turned), (x, w, group_sizes)


def _backward(turned, saved, dy):
    x, w, group_sizes = saved
    dy = dy.astype(x.dtype)
    dx = _products(dy, w, group_sizes, not turned).astype(x.dtype)
    dw = _outer(dy, x, group_sizes) if turned else _outer(x, dy, group_sizes)
    return dx, dw.astype(w.dtype), None


_one.defvjp(_forward, _backward)


def _products(x, w, group_sizes, turned):
    """x[m] @ w[group of m] (or its transpose): rows in float32, behind the last group 0."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))

    def one_block(y, group, rows, own):
        matrix = lax.dynamic_index_in_dim(w, group, keepdims=False).astype(x.dtype)
        product = _dot(rows(x), matrix, dimensions, wide)
        return rows(y, product if own is None else jnp.where(own, product, rows(y)))

    zeros, *_ = alike((jnp.zeros((x.shape[0], w.shape[1 if turned else 2]), wide), x))
    return _over_blocks(one_block, zeros, x.shape[0], group_sizes)


def _outer(a, b, group_sizes):
    """Sum over the rows of each group of a[m] b[m]^T: E A B in float32; exactly 0 for a group without rows."""
    wide = jnp.promote_types(a.dtype, jnp.float32)

    def one_block(dw, group, rows, own):
        # Both are cleared: what stands outside the group may be anything, also NaN.
        pair = (rows(x) if own is None else jnp.where(own, rows(x), 0) for x in (a, b))
        product = _dot(*pair, (((0,), (0,)), ((), ())), wide)
        return dw.at[group].add(product)

    zeros, *_ = alike((jnp.zeros((len(group_sizes), a.shape[1], b.shape[1]), wide), a))
    return _over_blocks(one_block, zeros, a.shape[0], group_sizes)


def _dot(a, b, dimensions, wide):
    return lax.dot_general(a, b, dimensions, precision=precision(a.dtype), preferred_element_type=wide)


def _over_blocks(step, carry, count: int, group_sizes):
    """`step(carry, group, rows, own)` for every block of the groups' rows: with few rows, few matrices are read.

    `rows(array)` are the block's rows, `rows(array, new)` is the array with others in their place. `own` (block 1) says
    which of them are the group's; None where all are.
    """
    if not count or not len(group_sizes):
        return carry
    ends = jnp.minimum(jnp.cumsum(group_sizes), count)
    following = jnp.concatenate([ends[:1] * 0, ends[:-1]])  # the row of each group that is next
    *whole, smallest = _blocks(count, len(group_sizes))
    for block in whole:
        blocks = (ends - following) // block
        carry = _over_equal_blocks(step, carry, count, block, blocks, following, None)
        following += blocks * block
    return _over_equal_blocks(step, carry, count, smallest, -(-(ends - following) // smallest), following, ends)


def _blocks(count: int, groups: int) -> list[int]:
    """Sizes that suit the average group."""
    average = count // groups
    suitable = [block for block in BLOCKS if block <= min(2 * average, count)]
    return suitable or [min(count, max(8, 2 ** average.bit_length()))]


def _over_equal_blocks(step, carry, count: int, block: int, blocks, first, ends):
    """`blocks[e]` steps for group e from row `first[e]`; with `ends`, the last of them may hold rows of others."""
    until = jnp.cumsum(blocks)

    def one_block(i, carry):
        group = jnp.sum(until <= i)
        start = first[group] + (i - until[group] + blocks[group]) * block
        place = jnp.minimum(start, count - block)  # the last rows make a whole block with those before them

        def rows(array, new=None):
            if new is None:
                return lax.dynamic_slice_in_dim(array, place, block)
            return lax.dynamic_update_slice_in_dim(array, new, place, 0)

        row = place + jnp.arange(block)[:, None]
        return step(carry, group, rows, None if ends is None else (row >= start) & (row < ends[group]))

    return lax.fori_loop(0, until[-1], one_block, carry)
