"""Trains a model: config -> mesh -> data -> model -> step -> loop.

    python train.py --config configs/parsit_tiny.yaml optimizer.learning_rate=1e-3 mesh.fsdp=2
    python train.py --config configs/parsit_tiny.yaml     # the same command again resumes
    python train.py --config configs/parsit_tiny.yaml --dry-run
    python train.py --help                                # every field of a config

Exit codes: 0 finished; 1 stopped by a fault; 2 a config that can't be used; 128 + n saved and stopped by signal n
(143 for SIGTERM).
"""

import argparse
import logging
import sys
from pathlib import Path

from vishwamai import experiment as experiments
from vishwamai import families
from vishwamai.checkpoint import CheckpointError, Checkpoints
from vishwamai.config import ConfigError
from vishwamai.data.sources import DataError
from vishwamai.parallel.mesh import make_mesh, simulate_cpu_devices
from vishwamai.training.diagnose import NonFiniteGradients
from vishwamai.training.loop import train
from vishwamai.training.run import create_run, initial_state, open_tokenizer, saved_step
from vishwamai.training.show import show_batch
from vishwamai.training.step import make_trainer
from vishwamai.training.summary import dry_run, field_table, trainable_table


def main(arguments: list[str]) -> int:
    # ---- config
    parser = argparse.ArgumentParser(prog="train.py", description="Trains a model.", add_help=False)
    parser.add_argument("--config", type=Path, help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, e.g. training.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters and totals; allocate nothing")
    parser.add_argument("--show-batch", action="store_true", help="print the next batch as text, write its images")
    parser.add_argument("--help", "-h", action="store_true", help="this, and every field of a config")
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        family = experiments.load(options.config, options.overrides).family if options.config else None
        print(parser.format_help() + "\n" + field_table(family))
        return 0
    if options.config is None:
        parser.error("--config is needed: one of configs/*.yaml")
    experiment = experiments.load(options.config, options.overrides)
    family = families.get(experiment.family)
    if options.dry_run:
        print(dry_run(experiment, family))
        return 0
    done = saved_step(experiment)
    if done >= experiment.training.steps and not options.show_batch:
        print(f"{experiment.run_dir} is finished ({done} steps); a higher training.steps continues it")
        return 0

    # ---- mesh
    simulate_cpu_devices(experiment.mesh)
    mesh = make_mesh(experiment.mesh)

    # ---- data
    tokenizer = open_tokenizer(experiment)
    source = family.batch_source(experiment, tokenizer)
    if options.show_batch:
        print(show_batch(source.batch(done), tokenizer, Path(experiment.run_dir, "show_batch"), sys.stdout.isatty()))
        return 0

    # ---- model and step
    trainer = make_trainer(experiment, family.build, mesh)
    print(trainable_table(trainer))

    # ---- loop
    create_run(experiment, tokenizer)
    keep = experiment.checkpoint.keep
    with Checkpoints(experiment.run_dir, trainer.abstract, trainer.shardings, keep) as checkpoints:
        state = checkpoints.restore()
        if state is None:
            state = initial_state(trainer, experiment, family)
        else:
            print(f"resuming {experiment.run_dir} after step {int(state.step)}")
        state, stopped = train(experiment, trainer, family.text_config(experiment.model), state, source, checkpoints)
    if stopped:
        print(f"{stopped.name}: saved after step {int(state.step)}; the same command resumes")
        return 128 + stopped
    print(f"finished: {int(state.step)} steps in {experiment.run_dir}")
    return 0


def without_late_writes(unraisable) -> None:
    """As Python's own hook, but for writes of a save that has failed already: they end after Orbax's loop is closed."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", force=True)
    for package in ("vishwamai", "parsit_jax", "kernels"):
        logging.getLogger(package).setLevel(logging.INFO)
    for name in ("absl", "asyncio"):  # Orbax logs there, with a traceback, what is told below
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = without_late_writes
    try:
        code = main(sys.argv[1:])
    except (ConfigError, DataError, CheckpointError, NonFiniteGradients, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    sys.exit(code)
