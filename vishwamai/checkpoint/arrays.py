"""Items of a checkpoint on disk: {name: array}, one per layer, saved and checked and loaded through Orbax."""

import json
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
        save(manager, step, {"parameters": unstack(parameters)})
        manager.wait_until_finished()
        manager.check_for_errors()
    return folder / str(step)


def load_arrays(run_dir: str | Path, step: int, abstract: nnx.State, shardings: nnx.State | None = None) -> Arrays:
    """All parameters of one checkpoint by name, one array per layer, in the dtypes that they were saved in.

    `abstract` says their names and shapes, `shardings` where they shall lie (default: the first device). Raises
    CheckpointError where there is no such checkpoint, where it is damaged, and where it is of another model.
    """
    folder = Path(run_dir).absolute() / FOLDER
    if step not in steps(run_dir):
        raise CheckpointError(f"{run_dir} has no checkpoint {step}; complete are: {steps(run_dir) or 'none'}")
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    flat = jax.eval_shape(unstack, abstract)
    placed = unstacked_shardings(abstract, shardings) if shardings is not None else dict.fromkeys(flat, first)
    with open_manager(folder, create=False) as manager:
        try:
            return load(manager, folder, step, {"parameters": flat}, {"parameters": placed})["parameters"]
        except Damaged as problem:
            raise CheckpointError(f"{folder / str(step)} is damaged: {problem}") from problem


def load_parameters(
    run_dir: str | Path, step: int, abstract: nnx.State, shardings: nnx.State | None = None
) -> nnx.State:
    """What `load_arrays` loads, stacked like `abstract`."""
    return stack(load_arrays(run_dir, step, abstract, shardings), abstract)


def open_manager(folder: Path, **options) -> ocp.CheckpointManager:
    """Orbax's manager of a checkpoints/ folder."""
    # Named here because a checkpoint's metadata can only be read by a manager that knows its items.
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("parameters", "optimizer")}
    handlers["about"] = ocp.JsonCheckpointHandler()
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options), item_handlers=handlers)


def save(manager: ocp.CheckpointManager, step: int, items: dict[str, Arrays]) -> None:
    """Starts to write a checkpoint. Raises CheckpointError for a step that is not the newest, and what Orbax raises."""
    # A batch is a function of its number, and nothing else is drawn at random: the step is the whole data position.
    about = {"format_version": FORMAT_VERSION, "step": step, "data": {"next_batch": step}}
    saved = {name: ocp.args.StandardSave(arrays) for name, arrays in items.items()}
    if not manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **saved)):
        # Orbax has skipped it in silence.
        raise CheckpointError(f"step {step} does not come after the checkpoints that are there: {manager.all_steps()}")


def load(manager: ocp.CheckpointManager, folder: Path, step: int, abstract: dict, shardings: dict) -> dict:
    """Items by name. Raises Damaged, and CheckpointError for a checkpoint that is whole but not this model's."""
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
    except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):
        raise  # the machine's fault, not the checkpoint's
    except Exception as error:
        raise Damaged(brief(error)) from error
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


def brief(error: BaseException) -> str:
    """The first telling line of an error of Orbax or TensorStore."""
    text = str(error) or repr(error)
    full = "No space left on device" in text
    return "no space left on device" if full else f"{type(error).__name__}: {text.splitlines()[0][:300]}"
