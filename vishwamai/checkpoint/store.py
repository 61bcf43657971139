"""A run's checkpoints/ folder: saved in the background, committed by a rename, restored exactly."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vishwamai.checkpoint.arrays import (
    COMMITTED,
    FOLDER,
    Arrays,
    CheckpointError,
    Damaged,
    brief,
    load,
    open_manager,
    save,
    steps,
)
from vishwamai.checkpoint.layers import stack, unstack, unstacked_shardings
from vishwamai.training.step import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. `abstract` and `shardings` are the trainer's: states are restored onto its mesh.

    Use it as a context manager: leaving waits for a save that is still being written.
    """

    def __init__(self, run_dir: str | Path, abstract: TrainState, shardings: TrainState, keep: int):
        self.run_dir = Path(run_dir).absolute()
        self.folder = self.run_dir / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in sorted(self.folder.glob("*.orbax-checkpoint-tmp*")):
            log.warning("%s was never finished (the run was stopped while saving): ignored", unfinished)
            shutil.rmtree(unfinished)
        for folder in sorted(self.folder.glob("*")):
            # Orbax would count it, and skip every save up to its step.
            if folder.name.isdigit() and int(folder.name) not in steps(self.run_dir):
                self._set_aside(int(folder.name), f"it has no {COMMITTED}: a copy that was cut off?")
        self._abstract = jax.eval_shape(_items, abstract)
        self._shardings = {
            "parameters": unstacked_shardings(abstract.trainable, shardings.trainable)
            | unstacked_shardings(abstract.frozen, shardings.frozen),
            "optimizer": unstacked_shardings(abstract.optimizer, shardings.optimizer),
        }
        self._items = jax.jit(_items, out_shardings=self._shardings)
        self._state = jax.jit(lambda items, step: _state(items, step, abstract), out_shardings=shardings)
        self._manager = open_manager(self.folder, max_to_keep=keep)
        self._saving: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:  # never hide the error that ends the run
                raise
        finally:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(steps(self.run_dir), default=None)

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing and returns; `state` may be donated at once. Raises CheckpointError, for the last save too."""
        if step == self._saving or step == self.latest:
            return
        self.wait()
        self._saving = step
        with self._explained():
            # Returns when all is in the host's memory, so that the next step may take the state's buffers.
            items = self._items(state)
            save(self._manager, step, {name: ocp.args.StandardSave(arrays) for name, arrays in items.items()})

    def check(self) -> None:
        """Raises CheckpointError if the save in the background has failed; does not wait."""
        with self._explained():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on disk. Raises CheckpointError if that failed."""
        with self._explained():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self) -> TrainState | None:
        """The newest readable state, or None where there is no checkpoint.

        A damaged checkpoint is set aside with a message and the one before it taken. Raises CheckpointError when none
        can be read, or for one of another model or format.
        """
        damaged = []
        for step in reversed(steps(self.run_dir)):
            try:
                items = load(self._manager, self.folder, step, self._abstract, self._shardings)
            except Damaged as problem:
                damaged.append(self._set_aside(step, problem))
                self._manager.reload()
                continue
            return self._state(items, jnp.int32(step))
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read; the damaged ones are now called "
                f"{', '.join(path.name for path in damaged)}. Run the same command again to start over"
            )
        return None

    def _set_aside(self, step: int, problem: object) -> Path:
        aside = self.folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        log.warning("checkpoint %d cannot be read (%s): set aside as %s", step, problem, aside)
        return aside

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that it is not on disk
            step, self._saving = self._saving, None
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            kept = f"checkpoint {self.latest} is complete" if self.latest is not None else "there is none before it"
            raise CheckpointError(
                f"checkpoint {step} could not be written to {self.folder}: {brief(error)}\n{kept}; make room if "
                f"that is why ({_free(self.folder)} are free), then run the same command again"
            ) from error


def _items(state: TrainState) -> dict[str, Arrays]:
    parameters = unstack(state.trainable) | unstack(state.frozen)
    return {"parameters": parameters, "optimizer": unstack(state.optimizer)}


def _state(items: dict[str, Arrays], step: jax.Array, like: TrainState) -> TrainState:
    parameters = items["parameters"]
    trainable, frozen = stack(parameters, like.trainable), stack(parameters, like.frozen)
    return TrainState(step, jnp.bool_(True), trainable, frozen, stack(items["optimizer"], like.optimizer))


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
