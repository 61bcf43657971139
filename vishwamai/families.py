"""Model families, looked up by name: whoever brings one registers it under the entry-point group below.

`vishwamai` never imports the packages that build on it; they announce themselves.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from flax import nnx

from vishwamai.config import Config, ConfigError

if TYPE_CHECKING:
    from vishwamai.convert.layout import Layout
    from vishwamai.data.loader import BatchSource
    from vishwamai.experiment import Experiment
    from vishwamai.tokenizer import VishwamAITokenizer

GROUP = "vishwamai.families"


@dataclass(frozen=True)
class Family:
    """Everything the trainer, the converter and the generator need to know of a family.

    name:          what a config's `family:` says
    model_config:  schema of the config's `model:` section
    data_config:   schema of its `data:` section
    build:         (model config, rngs=) -> module with `decoded(batch)`, `unembed(x)` and `language_model`
    text_config:   model config -> its decoder's TextConfig
    batch_source:  (experiment, tokenizer) -> global batches by step number
    layout:        the Hugging Face architecture(s) it is read from and written to
    """

    name: str
    model_config: type[Config]
    data_config: type[Config]
    build: Callable[..., nnx.Module]
    text_config: Callable[[Any], Any]
    batch_source: Callable[["Experiment", "VishwamAITokenizer"], "BatchSource"]
    layout: "Layout"


@cache
def _registered() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """Names of all registered families, sorted."""
    return sorted(_registered())


@cache
def get(name: str) -> Family:
    """The family called `name`. Raises ConfigError naming the nearest one."""
    if name not in _registered():
        near = difflib.get_close_matches(name, names(), 1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"registered: {', '.join(names()) or 'none, as the project is not installed'}"
        )
        raise ConfigError(f"family: {name!r} is not a model family; {hint}")
    return _registered()[name].load()


def for_architecture(architecture: str) -> Family:
    """The family that reads a Hugging Face `architectures` entry. Raises ConfigError listing what can be read."""
    families = [get(name) for name in names()]
    for family in families:
        if architecture in family.layout.architectures:
            return family
    known = sorted(a for family in families for a in family.layout.architectures)
    raise ConfigError(f"no family reads the architecture {architecture!r}; known: {', '.join(known)}")
