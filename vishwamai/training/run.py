"""The folder of a run: its resolved config, its tokenizer, and whether it may be resumed."""

import os
import shutil
from pathlib import Path
from typing import Any

from flax import nnx

from vishwamai import checkpoint
from vishwamai import experiment as experiments
from vishwamai.config import ConfigError, differences, dump_yaml, read_yaml
from vishwamai.convert.initial import load_parameters
from vishwamai.experiment import RESUMABLE, Experiment
from vishwamai.families import Family
from vishwamai.tokenizer import VishwamAITokenizer
from vishwamai.training.step import Trainer, TrainState

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"


def saved_step(experiment: Experiment) -> int:
    """How many steps the run in `run_dir` has done and saved; 0 for a new one.

    Raises ConfigError listing the keys that differ from the config it was started with, where they may not.
    """
    folder = Path(experiment.run_dir)
    steps = checkpoint.steps(folder)
    if not steps:
        return 0
    saved = load_config(folder)
    old, new = saved.model_dump(mode="json"), experiment.model_dump(mode="json")
    changed = [key for key in differences(old, new) if not key.startswith(RESUMABLE)]
    if changed:
        lines = "\n".join(f"  {key}: {_at(old, key)!r} -> {_at(new, key)!r}" for key in changed)
        raise ConfigError(
            f"{folder} was started with another config:\n{lines}\n"
            "Set these back to resume it, or name another run_dir to start a new run"
        )
    return max(steps)


def create_run(experiment: Experiment, tokenizer: VishwamAITokenizer) -> None:
    """Writes the resolved config and, unless the run reads its own already, the tokenizer's files as they are."""
    folder = Path(experiment.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    own, unfinished = folder / TOKENIZER, folder / f".{TOKENIZER}"
    if tokenizer.folder.resolve() != own.resolve():
        # What lies there is of a run that stopped before its first checkpoint, maybe with another tokenizer.
        for old in (unfinished, own):
            shutil.rmtree(old, ignore_errors=True)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(own)
    write_text(folder / CONFIG, dump_yaml(experiment))


def initial_state(trainer: Trainer, experiment: Experiment, family: Family) -> TrainState:
    """What a new run starts from: random weights by the seed, and those that `init_from` names in their place."""
    if experiment.init_from is None:
        return trainer.initial()
    found = load_parameters(experiment.init_from, family, experiment.model, trainer.shardings.parameters)
    parameters = dict(nnx.to_flat_state(found))
    if parameters.keys() != dict(nnx.to_flat_state(trainer.abstract.parameters)).keys():
        parameters = dict(nnx.to_flat_state(trainer.initial().parameters)) | parameters
    return trainer.from_parameters(nnx.from_flat_state(list(parameters.items())))


def load_config(run_dir: str | Path) -> Experiment:
    """The resolved config of a run. Raises ConfigError where there is none, or one of weights that were converted."""
    path = Path(run_dir) / CONFIG
    tree = read_yaml(path)
    if "training" not in tree:
        raise ConfigError(
            f"{run_dir} holds converted weights, no run that could be resumed: name another run_dir, "
            f"and start from these with init_from={run_dir}"
        )
    return experiments.parse(tree, str(path))


def open_tokenizer(experiment: Experiment) -> VishwamAITokenizer:
    """The tokenizer that a run uses: its own copy once it can be resumed, so that it reads on as it did.

    Raises ConfigError where there is none, or none that can be read.
    """
    own = Path(experiment.run_dir) / TOKENIZER
    resumed = own.is_dir() and checkpoint.steps(experiment.run_dir)
    try:
        return VishwamAITokenizer.from_pretrained(own if resumed else experiment.tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key whose last part may hold dots itself (a glob of learning_rate_scales)."""
    if not isinstance(tree, dict):
        return None
    first, _, rest = key.partition(".")
    return tree.get(key) if key in tree or not rest else _at(tree.get(first), rest)
