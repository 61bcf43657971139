"""Logical axes -> mesh axes, in one table. A change of parallelism is a change of config, never of a model."""

import functools
import logging

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)

RULES: dict[str, str | tuple[str, ...] | None] = {
    "rows": ("data", "fsdp"),  # every batch array and activation
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": None,
    "norm": None,
    "patch": None,
}


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array; a leading stacked layer dimension without a name is never split.

    A dimension that its mesh axes don't divide is left whole, and said so in the log.
    """
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    entries = []
    for name, size in zip(axes, shape, strict=True):
        target = RULES[name] if name is not None else None
        ways = _ways(target, mesh)
        if ways > 1 and size % ways:
            _warn_once(f"a dimension {name!r} of size {size} is not split: {ways} devices do not divide it")
            target = None
        entries.append(target)
    return PartitionSpec(*entries)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def parameter_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """A tree of NamedSharding shaped like `state` (arrays or abstract), from each parameter's logical axes."""

    def one(variable: nnx.Variable):
        value = variable.get_value()
        return variable.replace(NamedSharding(mesh, spec(variable.axes, value.shape, mesh)))

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["rows"]))


def row_shares(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return _ways(RULES["rows"], mesh)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout by logical axes; without a mesh in context it changes nothing."""
    spec = activation_spec(x.shape, *axes)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def activation_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec | None:
    """How an activation lies on the mesh in context; None where there is none, or one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    entries = [RULES[name] if name is not None else None for name in axes]
    # A dimension that can't be split evenly (a batch of one at inference) is left to the compiler.
    return PartitionSpec(
        *(
            entry if entry is None or size % _ways(entry, mesh) == 0 else None
            for entry, size in zip(entries, shape, strict=True)
        )
    )


def attention_spec(q: jax.Array, k: jax.Array) -> PartitionSpec | None:
    """How q (`B T N H`) lies on the mesh in context for `kernels.attention`; heads are split where k's allow it."""
    mesh = jax.sharding.get_abstract_mesh()
    ways, kv_heads = 1 if mesh.empty else _ways(RULES["heads"], mesh), k.shape[2]
    heads = "heads" if kv_heads % ways == 0 or ways % kv_heads == 0 else None
    return activation_spec(q.shape[:3], "rows", None, heads)


def _ways(target: str | tuple[str, ...] | None, mesh) -> int:
    names = (target,) if isinstance(target, str) else target or ()
    ways = 1
    for name in names:
        ways *= mesh.shape[name]
    return ways
