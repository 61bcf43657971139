"""Tables for people: the fields of a config, what trains, and the dry run."""

import math
from collections.abc import Iterable, Sequence

from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from vishwamai import families
from vishwamai.config import describe, dump_yaml
from vishwamai.experiment import Experiment
from vishwamai.families import Family
from vishwamai.models.layers import Carried
from vishwamai.parallel.mesh import AXES, devices_needed, resolve
from vishwamai.training.optimizer import path_name
from vishwamai.training.step import Trainer, make_trainer


def field_table(family: str | None = None) -> str:
    """Every field of a config with its type, default and meaning; of one family, or of all."""
    text = "Fields of every config:\n" + columns(_fields(Experiment))
    for name in [family] if family else families.names():
        found = families.get(name)
        fields = [*_fields(found.model_config, "model."), *_fields(found.data_config, "data.")]
        text += f"\n\nFields of `family: {name}`:\n" + columns(fields)
    return text


def _fields(schema, prefix: str = "") -> list[tuple[str, ...]]:
    return [(key, kind, f"[{default}]", meaning) for key, kind, default, meaning in describe(schema, prefix)]


def dry_run(experiment: Experiment, family: Family) -> str:
    """Resolved config, every parameter and exact totals. Touches no device and reads no file."""
    sizes = resolve(experiment.mesh, devices_needed(experiment.mesh))
    mesh = AbstractMesh(sizes, AXES, (AxisType.Auto,) * len(AXES))
    trainer = make_trainer(experiment, family.build, mesh)
    rows = [("parameter", "shape", "dtype", "sharding", "state", "numbers")]
    for state, variable, name in _parameters(trainer):
        value, spec = variable.get_value(), _sharding(trainer, name)
        rows.append((name, str(list(value.shape)), str(value.dtype), spec, state, f"{math.prod(value.shape):,}"))
    axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in experiment.mesh.sizes:
        axes += " (the axis of -1 takes what is left at start; shown for 1)"
    parts = [
        f"# resolved config\n{dump_yaml(experiment)}",
        f"# parameters (stacked layers first) on the mesh {axes}\n{columns(rows)}",
        f"# totals\n{trainable_table(trainer)}",
    ]
    if unsupported := family.layout.unsupported(experiment.model, experiment.data):
        lines = "\n".join(f"  {line}" for line in unsupported)
        parts.append(f"No Transformers class computes this config (it trains, but can't be exported):\n{lines}")
    return "\n\n".join(parts) + "\n\ndry run: nothing was allocated, read or written"


def trainable_table(trainer: Trainer) -> str:
    """How many numbers of each part train, with exact totals. `carried` weights are kept for export only."""
    kinds = ("trainable", "frozen", "carried")
    counts: dict[str, dict[str, int]] = {}
    for state, variable, name in _parameters(trainer):
        part = counts.setdefault(name.split(".")[0], dict.fromkeys(kinds, 0))
        part[state] += math.prod(variable.get_value().shape)
    counts["total"] = {kind: sum(part[kind] for part in counts.values()) for kind in kinds}
    rows = [("part", *kinds), *((name, *(f"{part[kind]:,}" for kind in kinds)) for name, part in counts.items())]
    return columns(rows)


def columns(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Rows of text, aligned; numbers to the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if text.replace(",", "").isdigit() else text.ljust(width)

    return "\n".join(indent + "  ".join(map(cell, row, widths)).rstrip() for row in rows)


def _parameters(trainer: Trainer) -> Iterable[tuple[str, nnx.Variable, str]]:
    """(trainable, frozen or carried; variable; name) in the model's order."""
    trains = {path for path, _ in nnx.to_flat_state(trainer.abstract.trainable)}
    for path, variable in nnx.to_flat_state(trainer.abstract.parameters):
        kind = "trainable" if path in trains else "carried" if isinstance(variable, Carried) else "frozen"
        yield kind, variable, path_name(path)


def _sharding(trainer: Trainer, name: str) -> str:
    placed = {path_name(path): v.get_value() for path, v in nnx.to_flat_state(trainer.shardings.parameters)}
    return "(" + ", ".join(str(axis or "-") for axis in placed[name].spec) + ")"
