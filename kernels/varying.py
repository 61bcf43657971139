"""Over which axes of a mesh an array differs from device to device, as a `jax.shard_map` with `check_vma` knows it."""

import jax
from jax import lax


def alike(tree):
    """All arrays varying over the axes that any of them varies over, as loops and custom gradients want them.

    The gradient of one that was the same on all devices is then the sum of theirs. Elsewhere nothing changes.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))

    def cast(x):
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def refusal(tree) -> str | None:
    """Why no Pallas kernel can take arrays of which one varies; None where none does."""
    if any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)):
        return "Pallas kernels need check_vma=False in the jax.shard_map around them"
    return None
