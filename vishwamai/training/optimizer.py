"""AdamW with schedules, clipping and per-parameter learning rates; what trains, decided by globs that must match."""

import fnmatch

import jax
import optax
from flax import nnx

from vishwamai.config import ConfigError
from vishwamai.experiment import OptimizerConfig, Schedule


def path_name(path: tuple) -> str:
    """A parameter's dotted path, as configs and tables write it."""
    return ".".join(str(getattr(part, "key", part)) for part in path)


def matching(patterns: list[str], paths: list[str], what: str) -> set[str]:
    """The paths that any glob matches. Raises ConfigError for a glob that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(paths, pattern)
        if not hits:
            raise ConfigError(f"{what}: {pattern!r} matches no parameter; the model has {', '.join(sorted(paths))}")
        found.update(hits)
    return found


def partition(state: nnx.State, patterns: list[str]) -> tuple[nnx.State, nnx.State]:
    """(trainable, frozen): parameters that a glob matches, and everything else (carried weights never train)."""
    flat = nnx.to_flat_state(state)
    parameters = [path_name(path) for path, variable in flat if isinstance(variable, nnx.Param)]
    chosen = matching(patterns, parameters, "training.trainable")
    trainable = [(path, v) for path, v in flat if path_name(path) in chosen]
    frozen = [(path, v) for path, v in flat if path_name(path) not in chosen]
    return nnx.from_flat_state(trainable), nnx.from_flat_state(frozen)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, cosine, or stable with a linear decay at the end."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(steps - config.warmup_steps, 1)
    match config.schedule:
        case Schedule.CONSTANT:
            after = optax.constant_schedule(peak)
        case Schedule.COSINE:
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        case Schedule.WSD:
            decay = max(int(rest * config.decay_fraction), 1)
            after = optax.linear_schedule(peak, end, decay, transition_begin=rest - decay)
    if not config.warmup_steps:
        return after
    # The first step already moves: a warm-up that starts at exactly 0 wastes it.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, trainable: nnx.State) -> optax.GradientTransformation:
    """The update rule for a trainable state (arrays or abstract)."""
    flat = nnx.to_flat_state(trainable)
    paths = [path_name(path) for path, _ in flat]
    scales = dict.fromkeys(paths, 1.0)
    for pattern, factor in config.learning_rate_scales.items():
        for path in matching([pattern], paths, "optimizer.learning_rate_scales"):
            scales[path] = factor
    by_path = nnx.from_flat_state([(path, v.replace(scales[path_name(path)])) for path, v in flat])
    # A matrix has two logical axes; the stacked layer dimension has none, so norms stay norms when scanned.
    decayed = nnx.from_flat_state([(path, v.replace(len(v.axes) >= 2)) for path, v in flat])
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, by_path)),
    )
