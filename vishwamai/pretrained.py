"""Trained models as functions of arrays: `VishwamAI.from_pretrained(folder)(input_ids)`."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from vishwamai import experiment, families
from vishwamai.config import ConfigError, read_yaml
from vishwamai.convert.folder import CARRIED
from vishwamai.convert.parameters import exported_tensors, state_path
from vishwamai.convert.source import open_source
from vishwamai.convert.to_hf import export
from vishwamai.data.batch import Batch, text_batch
from vishwamai.experiment import DType, Experiment
from vishwamai.families import Family
from vishwamai.generation import Draft, Generation, Sampling, left_padded
from vishwamai.generation.stopping import length_with, parsed
from vishwamai.models.transformer import Transformer
from vishwamai.tokenizer import VishwamAITokenizer


class Pretrained:
    """A model with its weights, config and tokenizer. Open one with `from_pretrained`.

    Attributes:
        folder: where it was read from.
        family, config: the model family, and the model's config.
        graph, parameters: `flax.nnx.merge(graph, parameters)` is the module.
        dtype: of the parameters and of the computation; logits and statistics are float32 in any case.
    """

    accepts: type[nnx.Module] = Transformer  # the model that a class's __call__ speaks of

    def __init__(self, folder: Path, family: Family, config: Any, parameters: nnx.State, dtype: str):
        self.folder = folder
        self.family = family
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: family.build(config, rngs=nnx.Rngs(0))))
        self.parameters = parameters

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
        if source.family.build is not cls.accepts:
            known = " or ".join(name for name in families.names() if families.get(name).build is cls.accepts)
            raise ConfigError(f"{source.folder} holds a {source.family.name}, expected a {known}")
        return cls(source.folder, source.family, source.config, source.parameters(dtype), dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that Transformers opens: these parameters, and what lies beside those that were read.

        Raises ConfigError where no Transformers class computes the model, or `folder` is not empty.
        """
        opened, flat = open_source(self.folder), dict(nnx.to_flat_state(self.parameters))

        def fetch(ours: str, layer: int | None) -> np.ndarray:
            array = np.asarray(flat[state_path(ours)].get_value())
            return array if layer is None else array[layer]

        export(opened, exported_tensors(str(self.folder), opened.rows, fetch), folder)

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


STOP_EVERY = 16  # tokens between two looks for a stop string, or two rounds of a stream
NEW_TOKENS = 256  # where the caller gives no bound


class Generated(NamedTuple):
    """tokens: ids with the prompt in front. log_probabilities: of the M new ones (`Generation.log_probabilities`)."""

    tokens: Int[np.ndarray, "B T+M"]
    log_probabilities: Float[np.ndarray, "B M"]


class VishwamAI(Pretrained):
    """A text model: `VishwamAI.from_pretrained(folder)(input_ids)` gives float32 logits `B T V`; `generate` goes on."""

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each position. `attention_mask` is 0 where there is padding, on either side.

        Raises:
            ValueError: ids that are no integers `B T`, or outside the vocabulary.
        """
        return self.logits(text_batch(checked_ids(input_ids, self.config.vocab_size), attention_mask))

    def generate(
        self,
        input_ids: Int[Array, "B T"] | Sequence[Sequence[int]],
        attention_mask: Int[Array, "B T"] | None = None,
        *,
        return_log_probabilities: bool = False,
        **options: Any,
    ) -> Int[np.ndarray, "B T+M"] | Generated:
        """Token ids, the prompt in front. Prompts of unequal lengths: padded on the left, or a list of lists of ids.

        Args:
            max_new_tokens, max_length: how many tokens at most, without or with the prompt; one of them, else 256.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see `generation.Sampling`; 0 is greedy.
            num_return_sequences: rows for each prompt, which stand together.
            stop: ids and strings that end a row, which keeps them; None: the checkpoint's end ids, []: nothing does.
                Behind the end stands the pad id.
            draft: another, much smaller VishwamAI with the same tokenizer, which proposes `draft_tokens` (4) at a time:
                the same tokens, sooner (speculative decoding, see `generation.decoding`).
            cache_dtype: "int8" or "float8_e4m3fn" keeps past keys and values in 8 bits (see `Generation`).
            return_log_probabilities: return `Generated`, which has the new tokens' log-probabilities too.

        Raises:
            ValueError: a prompt that is empty, too long or outside the vocabulary; an option out of range; a draft with
                another vocabulary.
        """
        prompts = self._prompts(input_ids, attention_mask)
        generation, strings = self._started(prompts, keep_log_probabilities=return_log_probabilities, **options)
        for _ in self._continued(generation, strings, every=None):
            pass
        ids, masks = np.asarray(prompts.tokens), np.asarray(prompts.segment_ids)
        front = np.where(masks > 0, ids, self.pad_id).repeat(options.get("num_return_sequences", 1), axis=0)
        tokens = np.concatenate([front, generation.tokens], axis=1)
        return Generated(tokens, generation.log_probabilities) if return_log_probabilities else tokens

    def stream(
        self, input_ids: Int[Array, "1 T"] | Sequence[Sequence[int]], **options: Any
    ) -> Iterator[Int[np.ndarray, " M"]]:
        """The new tokens of one prompt as they come, some at a time; options as `generate`'s."""
        prompts = self._prompts(input_ids, None)
        if prompts.rows != 1 or options.get("num_return_sequences", 1) != 1:
            raise ValueError(f"a stream has one row, found {prompts.rows} prompts: use generate")
        generation, strings = self._started(prompts, **options)
        return (tokens[0] for tokens in self._continued(generation, strings, every=STOP_EVERY))

    @cached_property
    def end_ids(self) -> list[int]:
        """What ends an answer, by generation_config.json, else config.json, else the tokenizer, else nothing.

        A run that was converted carries its source's. Raises ConfigError for a file that is no JSON object.
        """
        for name in ("generation_config.json", "config.json"):
            for path in (self.folder / name, self.folder / CARRIED / name):
                found = _json_object(path).get("eos_token_id") if path.is_file() else None
                if found is not None:
                    return [found] if isinstance(found, int) else list(found)
        try:
            return list(self.tokenizer.eos_token_ids)
        except FileNotFoundError:
            return []

    @cached_property
    def pad_id(self) -> int:
        """What stands behind the end of a row: the tokenizer's padding, else 0."""
        try:
            return self.tokenizer.pad_token_id or 0
        except FileNotFoundError:
            return 0

    def _prompts(self, input_ids, attention_mask) -> Batch:
        if not isinstance(input_ids, np.ndarray | jax.Array):
            input_ids = [np.asarray(row) for row in input_ids]
            if attention_mask is None:
                rows = [checked_ids([row], self.config.vocab_size)[0] if row.size else row for row in input_ids]
                return left_padded(rows, self.pad_id)
        return text_batch(checked_ids(input_ids, self.config.vocab_size), attention_mask)

    def _started(
        self,
        prompts: Batch,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        num_return_sequences: int = 1,
        stop: Sequence[int | str] | str | None = None,
        draft: "VishwamAI | None" = None,
        draft_tokens: int = 4,
        keep_log_probabilities: bool = False,
        cache_dtype: str | None = None,
        **sampling: Any,
    ) -> tuple[Generation, list[str]]:
        """What has its first tokens, and the strings that end a row."""
        length = prompts.tokens.shape[1]
        if max_new_tokens is not None and max_length is not None:
            raise ValueError("max_new_tokens and max_length were both given: which one counts?")
        if max_length is not None:
            if max_length <= length:
                raise ValueError(f"max_length={max_length} leaves no room behind a prompt of {length} tokens")
            max_new_tokens = max_length - length
        if max_new_tokens is None:
            max_new_tokens = min(NEW_TOKENS, max(1, self.config.max_position_embeddings - length))
        ids, strings = parsed(stop, self.end_ids if stop is None else ())
        generation = Generation(
            self.graph,
            self.parameters,
            prompts,
            max_new_tokens=max_new_tokens,
            end_ids=ids,
            pad_id=self.pad_id,
            sampling=Sampling(**sampling),
            samples=num_return_sequences,
            dtype=self.dtype,
            draft=draft and Draft(draft.graph, draft.parameters, draft_tokens, draft.dtype),
            keep_log_probabilities=keep_log_probabilities,
            cache_dtype=cache_dtype,
        )
        return generation, strings

    def _continued(
        self, generation: Generation, strings: Sequence[str], every: int | None
    ) -> Iterator[Int[np.ndarray, "B M"]]:
        """The tokens of every round, side by side the answer."""
        every = STOP_EVERY if strings else every or generation.max_new_tokens
        shown = 0
        while True:
            generation.advance(shown + every)
            if strings:
                tokens, decode = generation.tokens, self.tokenizer.decode
                new = {row: tokens[row, :length] for row, length in enumerate(generation.lengths) if length > shown}
                found = {row: length_with(answer, strings, decode, shown) for row, answer in new.items()}
                generation.cut({row: length for row, length in found.items() if length is not None})
            yield generation.tokens[:, shown:]
            shown += every
            if generation.done:
                return


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def checked_ids(input_ids: Int[Array, "B T"], vocab_size: int) -> np.ndarray:
    """Token ids as int32 `B T`. Raises ValueError for another shape or type, or an id outside the vocabulary."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids must be integers of shape B T, found {ids.dtype} {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        outside = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise ValueError(f"input_ids holds {outside}; the vocabulary's ids are 0 to {vocab_size - 1}")
    return ids.astype(np.int32)
