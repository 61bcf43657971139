"""Checkpoints larger than memory: arrays that are made when they are written, and read when they are asked for."""

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx

from vishwamai.checkpoint.arrays import FOLDER, check_step, damage_told, explained, open_manager, save, targets
from vishwamai.checkpoint.layers import array_names, leaves, unstack

# A commit and the opening of a checkpoint cost as much as a few megabytes: small arrays go together, up to this.
GROUP_BYTES = 2**25
CHUNK_BYTES = 2**23  # of what a large array is written in, and compressed

Index = tuple[slice, ...]
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Deferred:
    """An array of a shape and dtype that are known before `array[index]` makes a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.read(index)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _InParts(ocp.type_handlers.NumpyHandler):
    """Writes `Deferred` arrays as Orbax writes NumPy's, and makes no part before those in front are on disk."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values, infos, args=None):
        found = zip(values, infos, args, strict=True)
        for group in groups(found, lambda item: item[0].nbytes):
            await super()._background_serialize(*zip(*group, strict=True))

    async def _open_and_write(self, value: Deferred, tspec, ts_context):
        array = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        chunk = array.chunk_layout.write_chunk.shape
        corners = itertools.product(*(range(0, size, step) for size, step in zip(array.shape, chunk, strict=True)))
        for group in groups(corners, lambda _: math.prod(chunk) * value.dtype.itemsize):
            parts = [tuple(slice(at, at + step) for at, step in zip(corner, chunk, strict=True)) for corner in group]
            await asyncio.gather(*(array[part].write(value[part]) for part in parts))


def _how(array: Deferred) -> ocp.SaveArgs:
    # A stack of experts is written as it is read: one after the other.
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if len(array.shape) > 2 else ())


def groups(items: Iterable[Item], nbytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in their order, together up to GROUP_BYTES; a larger one is alone."""
    group, room = [], GROUP_BYTES
    for item in items:
        if group and nbytes(item) > room:
            yield group
            group, room = [], GROUP_BYTES
        group.append(item)
        room -= nbytes(item)
    if group:
        yield group


def save_deferred(run_dir: str | Path, arrays: Mapping[str, Deferred], step: int = 0) -> Path:
    """What `save_parameters` writes, from one array per layer by name. Returns the checkpoint's folder."""
    folder = Path(run_dir).absolute() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # Orbax warns where none is for jax.Array.
    handlers = (Deferred, _InParts()), (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    how = {name: _how(array) for name, array in arrays.items()}
    with open_manager(folder, parameters=handler) as manager:
        save(manager, step, {"parameters": ocp.args.PyTreeSave(dict(arrays), how)})
        manager.wait_until_finished()
        manager.check_for_errors()
    return folder / str(step)


def stored_arrays(run_dir: str | Path, step: int, abstract: nnx.State) -> dict[str, Deferred]:
    """The parameters of one checkpoint by name, one array per layer, in the dtypes that they were saved in.

    Nothing is read before it is asked for, and then with its neighbours in the stack, `GROUP_BYTES` together at most or
    one array; what was read before is let go. `abstract` says names and shapes.

    Raises CheckpointError, now or when an array is read, where there is no such checkpoint, where it is damaged, and
    where it is of another model.
    """
    folder = Path(run_dir).absolute() / FOLDER
    check_step(run_dir, step)
    flat = jax.eval_shape(unstack, abstract)
    with open_manager(folder, create=False) as manager, explained(folder, step):
        found = targets(manager, folder, step, {"parameters": flat})["parameters"]
    stacks = [array_names(path, leaf) for path, leaf in leaves(abstract)]
    together = (group for stack in stacks for group in groups(stack, lambda name: _nbytes(found[name])))
    homes = {name: group for group in together for name in group}
    held: dict[str, np.ndarray] = {}

    def read(name: str, index: Index) -> np.ndarray:
        if name not in held:
            held.clear()
            held.update(_restored(folder, step, {name: found[name] for name in homes[name]}))
        return held[name][index]

    return {name: Deferred(array.shape, array.dtype, partial(read, name)) for name, array in found.items()}


def _nbytes(array: jax.ShapeDtypeStruct) -> int:
    return array.size * array.dtype.itemsize


def _restored(folder: Path, step: int, arrays: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    how = dict.fromkeys(arrays, ocp.RestoreArgs(restore_type=np.ndarray))
    args = ocp.args.PyTreeRestore(item=arrays, restore_args=how, partial_restore=True)
    with explained(folder, step), damage_told(), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder / str(step) / "parameters", args=args)
