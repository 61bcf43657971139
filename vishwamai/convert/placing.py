"""Arrays that are read one layer at a time, straight into the sharded arrays of a mesh."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from vishwamai.checkpoint import Deferred
from vishwamai.checkpoint.layers import array_names, is_stacked, is_variable
from vishwamai.checkpoint.streaming import Index
from vishwamai.convert.copying import copy_into

ALIGNMENT = 64  # bytes; where the host is the device, XLA takes a buffer that begins so as it is


def place(
    arrays: Mapping[str, Deferred], abstract: nnx.State, dtype: str | np.dtype, shardings: nnx.State | None = None
) -> nnx.State:
    """The parameters of `abstract`, from one array per layer by name.

    A process reads what its own devices hold by `shardings` (default: everything, on the first device); beside that it
    holds one layer's array at a time.
    """
    if shardings is None:
        first = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda leaf: leaf.replace(first), abstract, is_leaf=is_variable)

    def one(path, leaf: nnx.Variable, sharding: nnx.Variable) -> nnx.Variable:
        parts = [arrays[name] for name in array_names(path, leaf)]
        shape = leaf.get_value().shape
        return leaf.replace(_placed(parts, is_stacked(leaf), shape, np.dtype(dtype), sharding.get_value()))

    return jax.tree_util.tree_map_with_path(one, abstract, shardings, is_leaf=is_variable)


def _placed(
    parts: Sequence[Deferred], stacked: bool, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> jax.Array:
    own = {_bounded(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    shards = {index: _empty(tuple(stop - start for start, stop in index), dtype) for index in own}
    # A layer is read for all shards before the next one, as reading it may mean to decompress it whole.
    for layer, part in enumerate(parts):
        for index, shard in shards.items():
            wanted = tuple(slice(*bounds) for bounds in (index[1:] if stacked else index))
            copy_into(shard[layer] if stacked else shard, part[wanted])
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[_bounded(index, shape)], dtype=dtype)


def _bounded(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
