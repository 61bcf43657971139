"""A text that is split over devices, dealt out so that each holds an early and a late piece of it, and put in order.

Of 2P pieces for P devices, device d holds 2d and 2d + 1 where the text is in order, d and 2P - 1 - d where it is dealt.
Trees of arrays `B L ...`, inside a shard_map over `axis`; two messages each way.
"""

import jax
import jax.numpy as jnp
from jax import lax


def dealt(tree, axis):
    """The early and the late piece, from two neighbouring ones."""
    even, odd = _ways(axis)
    first, second = _halves(tree)
    return _joined(*_by_parity(lax.ppermute(first, axis, even), lax.ppermute(second, axis, odd), axis))


def in_order(tree, axis):
    """The opposite of `dealt`."""
    even, odd = ([(to, source) for source, to in way] for way in _ways(axis))
    first, second = _by_parity(*_halves(tree), axis)
    return _joined(lax.ppermute(first, axis, even), lax.ppermute(second, axis, odd))


def _ways(axis) -> list[list[tuple[int, int]]]:
    """From which device to which the pieces of even numbers go, and those of odd ones: one of each to each device."""
    parts = lax.axis_size(axis)
    return [[(d, min(2 * d + i, 2 * parts - 1 - 2 * d - i)) for d in range(parts)] for i in (0, 1)]


def _by_parity(even, odd, axis):
    """(even, odd) on devices of even number, (odd, even) on the others; of early and late pieces the same way back."""
    straight = lax.axis_index(axis) % 2 == 0
    swap = lambda one, other: jax.tree.map(lambda x, y: jnp.where(straight, x, y), one, other)  # noqa: E731
    return swap(even, odd), swap(odd, even)


def _halves(tree):
    return (jax.tree.map(lambda x, i=i: jnp.split(x, 2, axis=1)[i], tree) for i in (0, 1))


def _joined(first, second):
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), first, second)
