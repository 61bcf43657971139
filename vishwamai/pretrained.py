"""Trained models as functions of arrays: `VishwamAI.from_pretrained(folder)(input_ids)`."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from vishwamai import experiment
from vishwamai.config import ConfigError, read_yaml
from vishwamai.convert.source import open_source
from vishwamai.data.batch import Batch, text_batch
from vishwamai.experiment import DType, Experiment
from vishwamai.families import Family
from vishwamai.tokenizer import VishwamAITokenizer


class Pretrained:
    """A model with its weights, config and tokenizer. Open one with `from_pretrained`.

    Attributes:
        folder: where it was read from.
        family, config: the model family, and the model's config.
        graph, parameters: `flax.nnx.merge(graph, parameters)` is the module.
        dtype: of the parameters and of the computation; logits and statistics are float32 in any case.
    """

    accepts = "qwen3"  # the family that a class's __call__ speaks of

    def __init__(self, folder: Path, family: Family, config: Any, parameters: nnx.State, dtype: str):
        self.folder = folder
        self.family = family
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: family.build(config, rngs=nnx.Rngs(0))))
        self.parameters = jax.tree.map(jnp.asarray, parameters)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: str = "float32") -> Self:
        """Reads a run, one of its checkpoints, an exported folder or a Hugging Face id.

        Raises:
            ConfigError: nothing there, weights of another model, or a hub that can't be reached; says which.
            CheckpointError: a run without a complete checkpoint, or a damaged one.
        """
        if dtype not in list(DType):
            raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DType)}")
        source = open_source(folder)
        if source.family.name != cls.accepts:
            raise ConfigError(f"{source.folder} holds a {source.family.name}, expected a {cls.accepts}")
        return cls(source.folder, source.family, source.config, source.parameters(dtype), dtype)

    @cached_property
    def tokenizer(self) -> VishwamAITokenizer:
        """The tokenizer beside the weights. Raises FileNotFoundError where there is none."""
        return VishwamAITokenizer.from_pretrained(self.folder)

    @cached_property
    def experiment(self) -> Experiment | None:
        """The run's whole config; None for a folder that was not trained here."""
        path = self.folder / "config.yaml"
        return experiment.load(path) if path.is_file() and "training" in read_yaml(path) else None

    def logits(self, batch: Batch) -> Float[Array, "B T V"]:
        """Float32 logits of whole rows; those of padding mean nothing."""
        return _logits(self.graph, self.dtype, self.parameters, batch)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(graph: nnx.GraphDef, dtype, parameters: nnx.State, batch: Batch) -> Float[Array, "B T V"]:
    model = nnx.merge(graph, parameters)
    return model.unembed(model.hidden_states(batch, dtype))


class VishwamAI(Pretrained):
    """A text model: `VishwamAI.from_pretrained(folder)(input_ids)` gives float32 logits `B T V`."""

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each position. `attention_mask` is 0 where there is padding, on either side.

        Raises:
            ValueError: ids that are no integers `B T`, or outside the vocabulary.
        """
        return self.logits(text_batch(checked_ids(input_ids, self.config.vocab_size), attention_mask))


def checked_ids(input_ids: Int[Array, "B T"], vocab_size: int) -> np.ndarray:
    """Token ids as int32 `B T`. Raises ValueError for another shape or type, or an id outside the vocabulary."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids must be integers of shape B T, found {ids.dtype} {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        outside = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise ValueError(f"input_ids holds {outside}; the vocabulary's ids are 0 to {vocab_size - 1}")
    return ids.astype(np.int32)
