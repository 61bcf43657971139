"""A tiny text model, its experiment, and batches that are a pure function of their number."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from vishwamai.config import Config, validate
from vishwamai.data.batch import Batch
from vishwamai.experiment import Experiment
from vishwamai.models.config import TextConfig
from vishwamai.models.transformer import Transformer
from vishwamai.parallel.mesh import make_mesh
from vishwamai.training.step import Trainer, make_trainer

MODEL = TextConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=4,
)


@dataclass(frozen=True)
class Sums:
    """Rows that count upwards in steps of 0 to 2: two packed examples and padding in each, weights of 0, 1 and 0.5."""

    rows: int = 8
    length: int = 21
    seed: int = 0

    def batch(self, step: int) -> Batch:
        draw = np.random.default_rng((self.seed, step))
        tokens = np.cumsum(draw.integers(0, 3, (self.rows, self.length)), axis=1) % MODEL.vocab_size
        cut = draw.integers(3, self.length - 6, (self.rows, 1))
        at = np.arange(self.length)[None]
        segments = np.where(at < cut, 1, np.where(at < self.length - 2, 2, 0))
        return Batch(
            tokens=tokens.astype(np.int32),
            positions=np.where(at < cut, at, at - cut).astype(np.int32) * (segments > 0),
            segment_ids=segments.astype(np.int32),
            loss_weights=(draw.choice([0.0, 1.0, 1.0, 0.5], (self.rows, self.length)) * (segments > 0)).astype(
                np.float32
            ),
        )

    def mixture(self, start: int, stop: int) -> dict[str, float]:
        return {}


@pytest.fixture
def source() -> Sums:
    return Sums()


@pytest.fixture
def tiny(tmp_path):
    """tiny(mesh={"fsdp": 2}, training={"steps": 3}) -> an Experiment whose run_dir is a temporary folder."""

    def make(**sections: dict[str, Any]) -> Experiment:
        model = validate(TextConfig, MODEL.model_dump() | sections.pop("model", {}), "test")
        training = {"steps": 5, "batch_size": 8, "loss_chunk": 8} | sections.pop("training", {})
        logging = {"tensorboard": False} | sections.pop("logging", {})
        run_dir = str(tmp_path / "run")
        fixed = dict(family="test", run_dir=run_dir, tokenizer="unused", model=model, data=Config())
        return Experiment(**fixed, training=training, logging=logging, **sections)

    return make


@pytest.fixture
def trainer_for(tiny):
    """The Trainer of `tiny(...)`."""

    def make(**sections: dict[str, Any]) -> Trainer:
        experiment = tiny(**sections)
        return make_trainer(experiment, Transformer, make_mesh(experiment.mesh))

    return make
