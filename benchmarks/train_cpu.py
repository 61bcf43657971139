"""Training on the CPU beside Transformers and PyTorch: one model, one process, float32, in turns.

    python -m benchmarks.train_cpu               # about 5 minutes on 2 cores; prints Markdown
    python -m benchmarks.train_cpu --config benchmarks/qwen3_moe.yaml

    | | tokens/s | seconds a step |
    |---|---|---|
    | ours | 8,404 (7,618-9,554) | 0.845 |
    | Transformers + PyTorch | 6,237 (5,366-7,213) | 1.138 |
    | ratio | 1.31 (1.19-1.61) | |

The config's model (default: that of configs/parsit_tiny.yaml) starts from random weights, exported into Transformers'
class by our own conversion. Both train on the same batches, a document model on drawn pages and a text model on rows of
random tokens, with AdamW, clipping and the same constants. In turns each trains for a few steps; a turn opens its own
loader and empties it, so that nobody's pages are drawn in the other's time. Needs the `torch` extra. A machine that
does other work at the time tells nothing: look at the spread.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.side_by_side import cpu_parser, markdown, only_cores, rested, spread

# ------------------------------------------------------------------ what runs where; before JAX and PyTorch start
parser = cpu_parser(__doc__, rounds=9)
parser.add_argument("--steps", type=int, default=8, help="training steps of a turn (default: %(default)s)")
parser.add_argument("--config", type=Path, default=Path("configs/parsit_tiny.yaml"), help="default: %(default)s")
options = parser.parse_args()
only_cores(options.cores)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from vishwamai import experiment as experiments  # noqa: E402
from vishwamai import families  # noqa: E402
from vishwamai.checkpoint import save_parameters  # noqa: E402
from vishwamai.convert.to_hf import to_hf  # noqa: E402
from vishwamai.data.batch import Batch, text_batch  # noqa: E402
from vishwamai.data.loader import BatchSource, loader  # noqa: E402
from vishwamai.experiment import Experiment, OptimizerConfig  # noqa: E402
from vishwamai.models.transformer import Transformer  # noqa: E402
from vishwamai.parallel.mesh import make_mesh  # noqa: E402
from vishwamai.parallel.sharding import row_sharding  # noqa: E402
from vishwamai.training.run import create_run, initial_state, open_tokenizer  # noqa: E402
from vishwamai.training.step import Trainer, TrainState, make_trainer  # noqa: E402

# The learning rate stays the same, so that PyTorch needs no schedule.
OVERRIDES = ["init_from=null", "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
FIRST_LOSS = 1e-4  # by how much the first losses may differ


@dataclass(frozen=True)
class Turn:
    """What some steps of training gave."""

    losses: list[float]
    tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


Train = Callable[[range], Turn]


def main() -> None:
    torch.set_num_threads(options.cores)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        experiment = experiments.load(options.config, [*OVERRIDES, f"run_dir={folder}"])
        family, tokenizer = families.get(experiment.family), open_tokenizer(experiment)
        is_text = family.build is Transformer
        source = RandomText(experiment) if is_text else family.batch_source(experiment, tokenizer)
        trainer = make_trainer(experiment, family.build, make_mesh(experiment.mesh))
        state = initial_state(trainer, experiment, family)
        create_run(experiment, tokenizer)
        model = exported(state, folder)
    ours, theirs = train_ours(trainer, state, source), train_theirs(model, experiment.optimizer, source)

    steps = range(options.steps)
    warm = ours(steps), theirs(steps)  # compiles, too
    for step in (steps[0], steps[-1]):
        print(f"loss of step {step + 1}: ours {warm[0].losses[step]:.6f}, PyTorch {warm[1].losses[step]:.6f}")
    if abs(warm[0].losses[0] - warm[1].losses[0]) > FIRST_LOSS:
        raise SystemExit(f"the first losses differ by more than {FIRST_LOSS}: these are not the same model and batch")

    turns: list[tuple[Turn, Turn]] = []
    for number in range(1, options.rounds + 1):
        steps = range(number * options.steps, (number + 1) * options.steps)
        turns.append((rested(ours, steps), rested(theirs, steps)))
    report(turns, experiment, sum(parameter.numel() for parameter in model.parameters()))


def exported(state: TrainState, run_dir: str) -> torch.nn.Module:
    """The same weights in Transformers' model, by way of `vishwamai convert to-hf`."""
    save_parameters(run_dir, state.parameters)
    folder = Path(run_dir, "transformers")
    to_hf(run_dir, folder)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    options = dict(dtype=torch.float32, attn_implementation="sdpa")
    return getattr(transformers, architecture).from_pretrained(folder, **options).train()


@dataclass(frozen=True)
class RandomText:
    """A BatchSource of whole rows of random tokens."""

    experiment: Experiment

    def batch(self, step: int) -> Batch:
        shape = self.experiment.training.batch_size, self.experiment.data.max_length
        ids = np.random.default_rng(step).integers(0, self.experiment.model.vocab_size, shape, np.int32)
        return replace(text_batch(ids), loss_weights=np.ones(shape, np.float32))


# ------------------------------------------------------------------ ours
def train_ours(trainer: Trainer, state: TrainState, source: BatchSource) -> Train:
    rows = row_sharding(trainer.mesh)

    def train(steps: range) -> Turn:
        nonlocal state
        start, tokens, metrics = time.perf_counter(), 0, []
        for batch in loader(source, steps.start, steps.stop):
            state, measured = trainer.step(state, jax.device_put(batch, rows))
            metrics.append(measured["loss"])
            tokens += np.count_nonzero(batch.segment_ids)
        losses = [float(total / weight) for total, weight in jax.device_get(metrics)]
        jax.block_until_ready(state)
        return Turn(losses, int(tokens), time.perf_counter() - start)

    return train


# ------------------------------------------------------------------ theirs
@dataclass(frozen=True)
class TorchBatches:
    """A BatchSource of what Transformers' model takes, made in the loader's threads too."""

    source: BatchSource

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        batch = self.source.batch(step)
        labels = np.where(batch.loss_weights > 0, batch.tokens, -100)
        text = {
            "input_ids": torch.from_numpy(batch.tokens).long(),
            "attention_mask": torch.from_numpy(batch.segment_ids).long(),
            "labels": torch.from_numpy(labels).long(),
        }
        if batch.patches is None:
            return text
        rows, columns = batch.grid
        if batch.patches.shape[1] != rows * columns or not (batch.patch_segment_ids == 1).all():
            raise SystemExit("rows hold one whole page each in this comparison: set data.max_patches=null")
        side = round((batch.patches.shape[2] / 3) ** 0.5)
        pixels = torch.from_numpy(batch.patches).view(-1, rows, columns, 3, side, side).permute(0, 3, 1, 4, 2, 5)
        return text | {"pixel_values": pixels.reshape(-1, 3, rows * side, columns * side).float() / 127.5 - 1}


def train_theirs(model: torch.nn.Module, config: OptimizerConfig, source: BatchSource) -> Train:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    constants = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon)
    optimizer = torch.optim.AdamW(groups, **constants, fused=True)
    coefficient = getattr(model.config, "router_aux_loss_coef", 0)
    routers = {"output_router_logits": True} if coefficient else {}

    def train(steps: range) -> Turn:
        start, tokens, losses = time.perf_counter(), 0, []
        for batch in loader(TorchBatches(source), steps.start, steps.stop):
            out = model(**batch, **routers)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            # Ours tells the cross-entropy alone.
            losses.append(out.loss.item() - (coefficient * out.aux_loss.item() if routers else 0))
            tokens += int(batch["attention_mask"].sum())
        return Turn(losses, tokens, time.perf_counter() - start)

    return train


# ------------------------------------------------------------------ report
def report(turns: list[tuple[Turn, Turn]], experiment: Experiment, size: int) -> None:
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    work = f"{experiment.training.batch_size} rows of {experiment.data.max_length} tokens"
    print(f"\n{size / 1e6:.1f} M parameters, {work}, {options.cores} cores; {versions}\n")
    rows = []
    for name, own in zip(("ours", "Transformers + PyTorch"), zip(*turns, strict=True), strict=True):
        step = statistics.median(turn.seconds / options.steps for turn in own)
        rows.append((name, spread([turn.speed for turn in own], digits=0), f"{step:.3f}"))
    ratios = [mine.speed / other.speed for mine, other in turns]
    print(markdown(("", "tokens/s", "seconds a step"), [*rows, ("ratio", spread(ratios), "")]))


if __name__ == "__main__":
    main()
