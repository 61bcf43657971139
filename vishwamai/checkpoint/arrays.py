"""A checkpoint's parameters as they were saved: one array per layer, in the types on disk."""

from pathlib import Path

import jax
from flax import nnx

from vishwamai.checkpoint.layers import unstack
from vishwamai.checkpoint.store import FOLDER, CheckpointError, _Damaged, _load, _manager, steps


def load_arrays(run_dir: str | Path, step: int, abstract: nnx.State) -> dict[str, jax.Array]:
    """{name: array} of all parameters of one checkpoint; unlike `load_parameters`, nothing is stacked.

    `abstract` says which there must be, and of what shape. Raises CheckpointError as `load_parameters` does.
    """
    folder = Path(run_dir).absolute() / FOLDER
    if step not in steps(run_dir):
        raise CheckpointError(f"{run_dir} has no checkpoint {step}; complete are: {steps(run_dir) or 'none'}")
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = jax.eval_shape(unstack, abstract)
    with _manager(folder, read_only=True) as manager:
        try:
            items = _load(manager, folder, step, {"parameters": expected}, {"parameters": dict.fromkeys(expected, first)})
        except _Damaged as problem:
            raise CheckpointError(f"{folder / str(step)} is damaged: {problem}") from problem
    return items["parameters"]
