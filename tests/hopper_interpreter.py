"""Pallas' interpreter of Mosaic-GPU kernels, made to know what ours do: for numbers and races, on a CPU.

It runs the copies, the barriers and the warpgroups of a block at the same time as threads. Added here: transposed
operands of `wgmma`, its reads and the stores of copies among what races are looked for in, an error for a store out of
bounds (the interpreter drops it), layouts (which mean nothing to it), and one compilation for all threads and blocks.
What it does not show: products and stores that are still under way (here they are done at once), swizzles, layouts.
"""

import threading
from functools import partial

import jax
import numpy as np
import pytest
from jax.interpreters import mlir

LOCK = threading.Lock()
PROGRAMS = {}  # of what a thread has to do


def needs_interpreter() -> None:
    """Skips the test where JAX is not the one whose interpreter, no public part of it, our tests were written for."""
    if jax.__version_info__[:2] != (0, 10):
        pytest.skip(f"written for the Mosaic-GPU interpreter of JAX 0.10, found JAX {jax.__version__}")


def interpreter(patch: pytest.MonkeyPatch):
    """What `interpret=` takes. Memory that nothing was written to holds NaN, and so does what is read out of bounds.

    As `needs_interpreter`.
    """
    needs_interpreter()
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    gpu_callbacks.reset_gpu_interpret_mode_state()
    patch.setattr(gpu_callbacks, "wgmma", _wgmma)
    patch.setattr(gpu_callbacks, "copy_smem_to_gmem", _copy_smem_to_gmem)
    patch.setattr(thread_map, "_run_jaxpr", _run_jaxpr)
    mlir.register_lowering(core.layout_cast_p, lambda context, x, new_layout: [x])
    return InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="nan")


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found


def _run_jaxpr(jaxpr, consts, *args):
    """Compiled once; the interpreter's own compiles it for each thread of each block."""
    with LOCK:
        if jaxpr not in PROGRAMS:
            run = jax.jit(partial(jax.core.eval_jaxpr, jaxpr))
            PROGRAMS[jaxpr] = run.lower(consts, *args).compile()
    PROGRAMS[jaxpr](consts, *args)


def _wgmma(*, acc_dtype, token, thread_id, acc_allocation_key_as_array, acc_transforms, source_info, **operands):
    memory = _Memory(operands.pop("device_id"), operands.pop("grid_point_coords"), thread_id, source_info)
    a, b = (
        memory.read(operands[f"{name}_allocation_key_as_array"], operands[f"{name}_transforms"]).astype(acc_dtype)
        for name in "ab"
    )
    sum_so_far = memory.read(acc_allocation_key_as_array, acc_transforms)
    memory.write(acc_allocation_key_as_array, acc_transforms, sum_so_far + a @ b)
    return token


def _copy_smem_to_gmem(
    *,
    token,
    device_id,
    grid_point_coords,
    thread_id,
    src_allocation_key_as_array,
    src_transforms,
    dst_allocation_key_as_array,
    dst_transforms,
    source_info,
    predicate,
    commit_group,
    reduction_op,
):
    assert predicate is None and reduction_op is None
    memory = _Memory(device_id, grid_point_coords, thread_id, source_info)
    memory.write(dst_allocation_key_as_array, dst_transforms, memory.read(src_allocation_key_as_array, src_transforms))
    return token


class _Memory:
    """Reads and writes of one thread, as the interpreter's own operations do them."""

    def __init__(self, device_id, grid_point_coords, thread_id, source_info):
        from jax._src.pallas.mosaic.interpret import utils
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        self.callbacks, self.utils = gpu_callbacks, utils
        self.memory = gpu_callbacks._get_shared_memory()
        self.thread = int(device_id), int(thread_id)
        self.info = source_info

    def read(self, key, transforms) -> np.ndarray:
        key, place, transposed = self._place(key, transforms)
        value, _, clock = self.memory.get_buffer_content(key, place, self.memory.get_global_thread_id(*self.thread))
        self.callbacks.get_races().check_read(*self.thread, clock, key, place, source_info=self.info)
        return value.T if transposed else value

    def write(self, key, transforms, value) -> None:
        key, place, transposed = self._place(key, transforms)
        assert not transposed
        inside, (shape, _), clock = self.memory.store_buffer_content(
            key, place, value, self.memory.get_global_thread_id(*self.thread)
        )
        if not inside:
            raise IndexError(f"{place} is written of an array of shape {shape}")
        self.callbacks.get_races().check_write(*self.thread, clock, key, place, source_info=self.info)

    def _place(self, key, transforms):
        from jax._src.state.indexing import NDIndexer
        from jax._src.state.types import TransposeTransform

        transforms = self.callbacks._remove_noop_transforms(transforms)
        transposed = bool(transforms) and isinstance(transforms[-1], TransposeTransform)
        transforms = transforms[:-1] if transposed else transforms
        assert all(isinstance(transform, NDIndexer) for transform in transforms), transforms
        place = self.utils.to_range(jax.tree.map(int, transforms))
        return self.callbacks.HostAllocationKey.from_array(key), place, transposed
