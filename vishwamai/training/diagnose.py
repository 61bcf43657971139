"""A gradient that is not finite: which tensor, which batch, and what to do."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vishwamai.data.batch import Batch
from vishwamai.training.optimizer import path_name
from vishwamai.training.step import Trainer, TrainState


class NonFiniteGradients(RuntimeError):
    """Training met NaN or infinity and stopped before it could spread."""


def explain(trainer: Trainer, state: TrainState, batch: Batch, run_dir: Path) -> NonFiniteGradients:
    """The error for a state that holds still at an unhealthy step; saves the step's batch beside the run's metrics."""
    step = int(state.step) + 1
    gradients, metrics, _ = trainer.gradients(state, batch)
    loss = float(metrics["loss"][0]) / float(metrics["loss"][1])
    file = run_dir / f"failed_step_{step}.npz"
    try:
        np.savez(file, **jax.tree.map(np.asarray, batch.as_dict()))
        saved = f"Its batch is in {file}."
    except OSError as error:  # a full disk must not hide what went wrong
        file.unlink(missing_ok=True)
        saved = f"Its batch could not be saved in {file} ({error})."
    culprits = [*_culprits(state.parameters, "parameter"), *_culprits(gradients, "gradient")]
    if not culprits:
        value, largest = max((float(jnp.abs(x).max()), name) for name, x in _arrays(gradients))
        culprits = [f"every number is finite, but their norm overflows; the largest is in {largest}: {value:.3g}"]
    shown = "\n  ".join(culprits[:20]) + (f"\n  ... and {len(culprits) - 20} more" if len(culprits) > 20 else "")
    return NonFiniteGradients(
        f"step {step} has gradients that are not finite (loss {loss}); nothing was updated:\n  {shown}\n"
        f"{saved} A lower optimizer.learning_rate, a longer optimizer.warmup_steps, "
        "training.z_loss or training.dtype=float32 may help; a wrong weight or pixel would stand in the batch"
    )


def _arrays(state: nnx.State) -> list[tuple[str, jax.Array]]:
    return [(path_name(path), variable.get_value()) for path, variable in nnx.to_flat_state(state)]


def _culprits(state: nnx.State, what: str) -> list[str]:
    lines = []
    for name, array in _arrays(state):
        nan, infinite = int(jnp.isnan(array).sum()), int(jnp.isinf(array).sum())
        if nan or infinite:
            lines.append(f"{what} {name}: {nan:,} NaN and {infinite:,} infinite of {array.size:,}")
    return lines
