"""A run of the tiny model, as `train.py` would make it."""

import json
from pathlib import Path

import pytest

from vishwamai.checkpoint import Checkpoints
from vishwamai.training.loop import train


@pytest.fixture
def run(trainer_for, tiny):
    """run(source, **sections) -> (last state, signal, lines of metrics.jsonl); again with the same resumes."""

    def make(source, **sections):
        experiment, trainer = tiny(**sections), trainer_for(**sections)
        Path(experiment.run_dir).mkdir(exist_ok=True)
        with Checkpoints(experiment.run_dir, trainer.abstract, trainer.shardings, keep=2) as checkpoints:
            state = checkpoints.restore() or trainer.initial()
            state, stopped = train(experiment, trainer, experiment.model, state, source, checkpoints)
        return state, stopped, read_lines(experiment.run_dir)

    return make


def read_lines(run_dir):
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
