"""A run's checkpoints/ folder: saved in the background, committed by a rename, restored exactly."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from vishwamai.checkpoint.layers import stack, unstack, unstacked_shardings
from vishwamai.training.step import TrainState

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
FORMAT_VERSION = 1
_COMMITTED = "_CHECKPOINT_METADATA"  # stands in every folder that Orbax has finished


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which, why and what to do."""


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
        self._abstract = jax.eval_shape(_items, abstract)
        self._shardings = {
            "parameters": unstacked_shardings(abstract.trainable, shardings.trainable)
            | unstacked_shardings(abstract.frozen, shardings.frozen),
            "optimizer": unstacked_shardings(abstract.optimizer, shardings.optimizer),
        }
        # Copies, because the next step takes the state's own buffers while these are still being written.
        copied = lambda state: jax.tree.map(jnp.copy, _items(state))  # noqa: E731
        self._copied_items = jax.jit(copied, out_shardings=self._shardings)
        self._state = jax.jit(lambda items, step: _state(items, step, abstract), out_shardings=shardings)
        self._manager = _manager(self.folder, max_to_keep=keep)
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
            _save(self._manager, step, self._copied_items(state))

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
                items = _load(self._manager, self.folder, step, self._abstract, self._shardings)
            except _Damaged as problem:
                aside = self.folder / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
                damaged.append(aside)
                log.warning("checkpoint %d cannot be read (%s): set aside as %s", step, problem, aside)
                self._manager.reload()
                continue
            return self._state(items, jnp.int32(step))
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read; the damaged ones are now called "
                f"{', '.join(path.name for path in damaged)}. Run the same command again to start over"
            )
        return None

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
                f"checkpoint {step} could not be written to {self.folder}: {_brief(error)}\n{kept}; make room "
                f"({_free(self.folder)} are free), then run the same command again"
            ) from error


def save_parameters(run_dir: str | Path, parameters: nnx.State, step: int = 0) -> Path:
    """Writes a checkpoint that holds weights only (a run can start from it, not resume). Returns its folder."""
    folder = Path(run_dir).absolute() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with _manager(folder) as manager:
        _save(manager, step, {"parameters": unstack(parameters)})
        manager.wait_until_finished()
        manager.check_for_errors()
    return folder / str(step)


def load_parameters(
    run_dir: str | Path, step: int, abstract: nnx.State, shardings: nnx.State | None = None
) -> nnx.State:
    """All parameters of one checkpoint, in the dtype that they were saved in.

    `abstract` says their names and shapes, `shardings` where they shall lie (default: the first device). Raises
    CheckpointError where there is no such checkpoint, where it is damaged, and where it is of another model.
    """
    folder = Path(run_dir).absolute() / FOLDER
    if step not in steps(run_dir):
        raise CheckpointError(f"{run_dir} has no checkpoint {step}; complete are: {steps(run_dir) or 'none'}")
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    flat = jax.eval_shape(unstack, abstract)
    placed = unstacked_shardings(abstract, shardings) if shardings is not None else dict.fromkeys(flat, first)
    with _manager(folder, read_only=True) as manager:
        try:
            items = _load(manager, folder, step, {"parameters": flat}, {"parameters": placed})
        except _Damaged as problem:
            raise CheckpointError(f"{folder / str(step)} is damaged: {problem}") from problem
    return stack(items["parameters"], abstract)


def latest_step(run_dir: str | Path) -> int:
    """Step of a run's newest complete checkpoint. Raises CheckpointError if there is none."""
    found = steps(run_dir)
    if not found:
        raise CheckpointError(f"{run_dir} holds no complete checkpoint; expected {FOLDER}/<step>/ in it")
    return found[-1]


def steps(run_dir: str | Path) -> list[int]:
    """Steps of a run's complete checkpoints, in order."""
    folders = Path(run_dir, FOLDER).glob("*")
    return sorted(int(p.name) for p in folders if p.name.isdigit() and (p / _COMMITTED).exists())


class _Damaged(Exception):
    """A committed checkpoint whose files are gone or cut off."""


def _manager(folder: Path, **options) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options))


def _items(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    parameters = unstack(state.trainable) | unstack(state.frozen)
    return {"parameters": parameters, "optimizer": unstack(state.optimizer)}


def _state(items: dict[str, dict[str, jax.Array]], step: jax.Array, like: TrainState) -> TrainState:
    parameters = items["parameters"]
    trainable, frozen = stack(parameters, like.trainable), stack(parameters, like.frozen)
    return TrainState(step, jnp.bool_(True), trainable, frozen, stack(items["optimizer"], like.optimizer))


def _save(manager: ocp.CheckpointManager, step: int, items: dict[str, dict]) -> None:
    # A batch is a function of its number, and nothing else is drawn at random: the step is the whole data position.
    about = {"format_version": FORMAT_VERSION, "step": step, "data": {"next_batch": step}}
    saved = {name: ocp.args.StandardSave(arrays) for name, arrays in items.items()}
    manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **saved))


def _load(manager: ocp.CheckpointManager, folder: Path, step: int, abstract: dict, shardings: dict) -> dict:
    """Items by name. Raises _Damaged, and CheckpointError for a checkpoint that is whole but not this model's."""
    where = folder / str(step)
    try:
        about = json.loads((where / "about" / "metadata").read_text())
        held = {name: manager.item_metadata(step)[name] for name in abstract if (where / name).is_dir()}
        held = {name: dict(metadata.tree) for name, metadata in held.items()}
    except Exception as error:
        raise _Damaged(_brief(error)) from error
    if about.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {about.get('format_version')}, this code reads {FORMAT_VERSION}: "
            "read it with the version that wrote it"
        )
    if missing := [name for name in abstract if name not in held]:
        raise CheckpointError(
            f"{where} holds no {' and no '.join(missing)}: it can't be resumed; "
            "start a new run from it with init_from (and another run_dir)"
        )
    targets = {}
    for name, arrays in abstract.items():
        saved = held[name]
        _check_shapes(where, {k: tuple(v.shape) for k, v in saved.items()}, {k: v.shape for k, v in arrays.items()})
        targets[name] = {
            key: jax.ShapeDtypeStruct(value.shape, saved[key].dtype, sharding=shardings[name][key])
            for key, value in arrays.items()
        }
    wanted = {name: ocp.args.StandardRestore(arrays) for name, arrays in targets.items()}
    try:
        found = manager.restore(step, args=ocp.args.Composite(**wanted))
    except Exception as error:
        raise _Damaged(_brief(error)) from error
    return {name: found[name] for name in abstract}


def _check_shapes(where: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    lines = [f"{name} {found[name]} is not in the model" for name in sorted(found.keys() - expected.keys())]
    lines += [f"{name} {expected[name]} is not in the checkpoint" for name in sorted(expected.keys() - found.keys())]
    lines += [
        f"{name} has shape {found[name]}, the model's is {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if lines:
        more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
        shown = "\n  ".join(lines[:10])
        raise CheckpointError(f"{where} is a checkpoint of another model:\n  {shown}{more}")


def _brief(error: BaseException) -> str:
    """The first telling line of an error of Orbax or TensorStore."""
    text = str(error) or repr(error)
    full = "No space left on device" in text
    return "no space left on device" if full else f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
