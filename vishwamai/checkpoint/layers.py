"""Stacked layers <-> one array per layer: what stands on disk does not depend on what was scanned."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec


def unstack(tree: Any) -> dict[str, Any]:
    """{"language_model.layers.3.self_attn.q_proj.kernel": array} of a tree of arrays and nnx variables.

    A stack is known by having one dimension more than its variable has logical axes.
    """
    arrays = {}
    for path, leaf in leaves(tree):
        names, value = array_names(path, leaf), _value(leaf)
        arrays |= {name: value[i] for i, name in enumerate(names)} if is_stacked(leaf) else {names[0]: value}
    return arrays


def stack(arrays: Mapping[str, Any], like: Any) -> Any:
    """The tree shaped like `like` (arrays or abstract) whose `unstack` is `arrays`."""

    def one(path, leaf):
        names = array_names(path, leaf)
        found = jnp.stack([arrays[name] for name in names]) if is_stacked(leaf) else arrays[names[0]]
        return leaf.replace(found) if isinstance(leaf, nnx.Variable) else found

    return jax.tree_util.tree_map_with_path(one, like, is_leaf=is_variable)


def unstacked_shardings(abstract: Any, shardings: Any) -> dict[str, NamedSharding]:
    """The sharding of every array of `unstack(abstract)`, from that of the stack it is part of."""
    flat = {}
    placed = jax.tree.leaves(shardings, is_leaf=is_variable)
    for (path, leaf), sharding in zip(leaves(abstract), placed, strict=True):
        sharding = _value(sharding)
        if is_stacked(leaf):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        flat |= dict.fromkeys(array_names(path, leaf), sharding)
    return flat


def array_names(path: tuple, leaf: Any) -> list[str]:
    """The names on disk of what a leaf at a path of the tree holds: one for each layer, or one."""
    parts = _parts(path)
    if not is_stacked(leaf):
        return [".".join(parts)]
    return [name_in_stack(parts, i) for i in range(leaf.get_value().shape[0])]


def is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _value(leaf: Any) -> Any:
    return leaf.get_value() if is_variable(leaf) else leaf


def is_stacked(leaf: Any) -> bool:
    """Whether a leaf has a first axis for layers."""
    return is_variable(leaf) and len(leaf.get_value().shape) > len(leaf.axes)


def leaves(tree: Any) -> Iterator[tuple[tuple, Any]]:
    """(path, array or variable) of a tree."""
    yield from jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)


def _parts(path: tuple) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]


def name_in_stack(parts: list[str], index: int) -> str:
    """The name of one layer's array of a stack that lies at a path.

    The path says which layers those are: `layers` and `unused_layers` stack 0, 1, 2, ..., `layers.5::6` stacks layers
    5, 11, 17, ... (see models.pattern). Raises ValueError for a path that says nothing.
    """
    at = max((i for i, part in enumerate(parts) if part.endswith("layers")), default=None)
    if at is None:
        raise ValueError(f"{'.'.join(parts)} is stacked, but no part of its name ends with 'layers'")
    first, strided, step = parts[at + 1].partition("::")
    number = int(first) + index * int(step) if strided else index
    return ".".join([*parts[: at + 1], str(number), *parts[at + 1 + bool(strided) :]])
