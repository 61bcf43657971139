"""Items of a checkpoint on disk: {name: array}, one per layer, saved and checked and loaded through Orbax."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx

from vishwamai.checkpoint.layers import stack, unstack, unstacked_shardings

FOLDER = "checkpoints"
FORMAT_VERSION = 1
COMMITTED = "_CHECKPOINT_METADATA"  # stands in every folder that Orbax has finished

Arrays = dict[str, jax.Array]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which, why and what to do."""


class Damaged(Exception):
    """A committed checkpoint whose files are gone or cut off."""


def latest_step(run_dir: str | Path) -> int:
    """Step of a run's newest complete checkpoint. Raises CheckpointError if there is none."""
    found = steps(run_dir)
    if not found:
        raise CheckpointError(f"{run_dir} holds no complete checkpoint; expected {FOLDER}/<step>/ in it")
    return found[-1]


def steps(run_dir: str | Path) -> list[int]:
    """Steps of a run's complete checkpoints, in order."""
    folders = Path(run_dir, FOLDER).glob("*")
    return sorted(int(p.name) for p in folders if p.name.isdigit() and (p / COMMITTED).exists())


def save_parameters(run_dir: str | Path, parameters: nnx.State, step: int = 0) -> Path:
    """Writes a checkpoint that holds weights only (a run can start from it, not resume). Returns its folder."""
    folder = Path(run_dir).absolute() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with open_manager(folder) as manager:
        save(manager, step, {"parameters": ocp.args.StandardSave(unstack(parameters))})
        manager.wait_until_finished()
        manager.check_for_errors()
    return folder / str(step)


def load_parameters(
    run_dir: str | Path, step: int, abstract: nnx.State, shardings: nnx.State | None = None
) -> nnx.State:
    """All parameters of one checkpoint, in the dtypes that they were saved in.

    `abstract` says their names and shapes, `shardings` where they shall lie (default: the first device). Raises
    CheckpointError where there is no such checkpoint, where it is damaged, and where it is of another model.
    """
    folder = Path(run_dir).absolute() / FOLDER
    check_step(run_dir, step)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    flat = jax.eval_shape(unstack, abstract)
    placed = unstacked_shardings(abstract, shardings) if shardings is not None else dict.fromkeys(flat, first)
    with open_manager(folder, create=False) as manager, explained(folder, step):
        arrays = load(manager, folder, step, {"parameters": flat}, {"parameters": placed})["parameters"]
    return stack(arrays, abstract)


def check_step(run_dir: str | Path, step: int) -> None:
    """Raises CheckpointError unless a run has a complete checkpoint of a step."""
    if step not in steps(run_dir):
        raise CheckpointError(f"{run_dir} has no checkpoint {step}; complete are: {steps(run_dir) or 'none'}")


@contextlib.contextmanager
def explained(folder: Path, step: int) -> Iterator[None]:
    """Raises CheckpointError, naming the checkpoint, for what can't be read in it."""
    try:
        yield
    except Damaged as problem:
        raise CheckpointError(f"{folder / str(step)} is damaged: {problem}") from problem


def open_manager(folder: Path, parameters: ocp.CheckpointHandler | None = None, **options) -> ocp.CheckpointManager:
    """Orbax's manager of a checkpoints/ folder; `parameters` is what writes those, if not the standard handler."""
    # Named here because a checkpoint's metadata can only be read by a manager that knows its items.
    handlers = {
        "parameters": parameters or ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "about": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options), item_handlers=handlers)


def save(manager: ocp.CheckpointManager, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> None:
    """Starts to write a checkpoint. Raises CheckpointError for a step that is not the newest, and what Orbax raises."""
    # A batch is a function of its number, and nothing else is drawn at random: the step is the whole data position.
    about = {"format_version": FORMAT_VERSION, "step": step, "data": {"next_batch": step}}
    if not manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items)):
        # Orbax has skipped it in silence.
        raise CheckpointError(f"step {step} does not come after the checkpoints that are there: {manager.all_steps()}")


def targets(manager: ocp.CheckpointManager, folder: Path, step: int, abstract: dict[str, dict]) -> dict[str, dict]:
    """{item: {name: shape and dtype}} as they were saved, in the order of `abstract`; reads no array.

    Raises Damaged, and CheckpointError for a checkpoint that is whole but not this model's.
    """
    where = folder / str(step)
    try:
        about = json.loads((where / "about" / "metadata").read_text())
        held = {name: manager.item_metadata(step)[name] for name in abstract if (where / name).is_dir()}
        held = {name: dict(metadata.tree) for name, metadata in held.items()}
    except Exception as error:
        raise Damaged(brief(error)) from error
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
    found = {}
    for name, arrays in abstract.items():
        saved = held[name]
        _check_shapes(where, {k: tuple(v.shape) for k, v in saved.items()}, {k: v.shape for k, v in arrays.items()})
        found[name] = {key: jax.ShapeDtypeStruct(value.shape, saved[key].dtype) for key, value in arrays.items()}
    return found


def load(manager: ocp.CheckpointManager, folder: Path, step: int, abstract: dict, shardings: dict) -> dict:
    """Items by name. Raises what `targets` raises."""
    wanted = {
        item: {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[item][name])
            for name, array in arrays.items()
        }
        for item, arrays in targets(manager, folder, step, abstract).items()
    }
    restore = {name: ocp.args.StandardRestore(arrays) for name, arrays in wanted.items()}
    with damage_told():
        found = manager.restore(step, args=ocp.args.Composite(**restore))
    return {name: found[name] for name in abstract}


@contextlib.contextmanager
def damage_told() -> Iterator[None]:
    """Raises Damaged for what Orbax raises while it reads arrays."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):
        raise  # the machine's fault, not the checkpoint's
    except Exception as error:
        raise Damaged(brief(error)) from error


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


def brief(error: BaseException) -> str:
    """The first telling line of an error of Orbax or TensorStore."""
    text = str(error) or repr(error)
    full = "No space left on device" in text
    return "no space left on device" if full else f"{type(error).__name__}: {text.splitlines()[0][:300]}"
