"""The document model: SigLIP -> projector -> Qwen3. Shape letters as in `vishwamai`."""

import importlib

# Names load on first use, as in `vishwamai`.
_HOME = {"Parsit": "parsit_jax.pretrained", "ParsitInference": "parsit_jax.inference"}
__all__ = ["Parsit", "ParsitInference"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"parsit_jax exports {', '.join(__all__)}; found {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
