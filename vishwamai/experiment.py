"""An experiment: everything a run is made of, in one validated config."""

from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from vishwamai import families
from vishwamai.config import Config, ConfigError, apply_overrides, read_yaml, validate
from vishwamai.models.config import Remat, Softmax
from vishwamai.parallel.mesh import MeshConfig


class Schedule(StrEnum):
    """How the learning rate falls after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    WSD = "wsd"  # warm-up, stable, linear decay over the last `decay_fraction` of the steps


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    schedule: Schedule = Field(Schedule.COSINE, description="constant, cosine or wsd")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="share of the steps in which wsd decays")
    final_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; matrices only, never norms and biases")
    clip_norm: float = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    learning_rate_scales: dict[str, float] = Field(
        {}, description="glob of parameter paths -> factor on the learning rate, e.g. {'vision_tower.*': 0.1}"
    )


class TrainingConfig(Config):
    """The loop."""

    steps: int = Field(gt=0, description="optimizer steps in all")
    batch_size: int = Field(gt=0, description="rows per optimizer step, over all devices and micro-batches")
    gradient_accumulation: int = Field(1, gt=0, description="micro-batches per step; equal to one big batch")
    trainable: list[str] = Field(["*"], description="globs of parameter paths that train; the rest is frozen")
    dtype: DType = Field(DType.FLOAT32, description="compute dtype; parameters and statistics stay float32")
    remat: Remat = Field(Remat.NONE, description="what the backward pass recomputes: none, dots, full")
    attention_softmax: Softmax = Field(
        Softmax.RUNNING,
        description="running, or bounded: faster on TPUs while q/k norm's gains or a soft cap keep attention's logits "
        "within 50 (max_logit in metrics.jsonl; the same above), at 1.2 to 1.4 times the rounding error in bfloat16",
    )
    z_loss: float = Field(0.0, ge=0, description="weight of log(Z)^2, which keeps logits from drifting (PaLM)")
    loss_chunk: int = Field(512, gt=0, description="most positions of a row whose logits exist at the same time")


class CheckpointConfig(Config):
    """When the state is saved; always also at the end and on SIGTERM."""

    every: int = Field(500, gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="how many are kept")


class LoggingConfig(Config):
    """What is written while training."""

    every: int = Field(1, gt=0, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="also write TensorBoard files")


class EvaluationConfig(Config):
    """What `eval.py` scores when no benchmarks are named."""

    benchmarks: list[str] = Field([], description="names of benchmarks")
    limit: int | None = Field(None, gt=0, description="examples per benchmark; null is all")
    batch_size: int = Field(32, gt=0, description="questions answered, or rows of text scored, at once")


class Experiment(Config):
    """A run. `model` and `data` have the schema of the chosen family."""

    family: str = Field(description="model family: see the list under --help")
    run_dir: str = Field(description="folder of the run: config, metrics, checkpoints, report")
    seed: int = Field(0, ge=0, description="seed of initial weights and data order")
    tokenizer: str = Field(description="folder with tokenizer.json or a SentencePiece model")
    init_from: str | dict[str, str] | None = Field(
        None,
        description="weights to start from: a run, an exported folder or a hub id, or {part: folder}; read at start",
    )
    model: Config
    data: Config
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW and its schedule")
    mesh: MeshConfig = Field(MeshConfig(), description="devices per axis")
    training: TrainingConfig = Field(description="steps, batch, precision")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when to save")
    logging: LoggingConfig = Field(LoggingConfig(), description="metrics")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="defaults of eval.py")


# What may change when a run is resumed: none of it changes what the remaining steps compute, steps aside.
RESUMABLE = ("training.steps", "checkpoint.", "logging.", "evaluation.", "mesh.", "run_dir")


@cache
def schema(family: str) -> type[Experiment]:
    """The Experiment whose `model` and `data` sections are those of `family`."""
    found = families.get(family)
    return create_model(
        f"{family.title()}Experiment",
        __base__=Experiment,
        model=(found.model_config, Field(description="the model")),
        data=(found.data_config, Field(description="the data")),
    )


def parse(tree: dict[str, Any], where: str) -> Experiment:
    """A validated experiment from a nested mapping."""
    if "family" not in tree:
        raise ConfigError(f"{where}: no `family`; registered: {', '.join(families.names())}")
    experiment = validate(schema(str(tree["family"])), tree, where)
    text = families.get(experiment.family).text_config(experiment.model)
    if experiment.training.attention_softmax is Softmax.BOUNDED and not text.bounds_logits:
        raise ConfigError(
            f"{where}: training.attention_softmax=bounded, but nothing bounds the logits of this model: set it to "
            "running (model has neither qk_norm nor attn_logit_softcapping)"
        )
    context = text.max_position_embeddings
    if experiment.data.max_length > context:
        raise ConfigError(
            f"{where}: data.max_length={experiment.data.max_length} is longer than the model's context: lower it to "
            f"model's max_position_embeddings={context}, or raise that"
        )
    return experiment


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """Reads a YAML config, applies dotted overrides and validates it. Raises ConfigError."""
    return parse(apply_overrides(read_yaml(path), overrides), str(path))
