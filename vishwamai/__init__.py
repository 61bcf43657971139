"""The text model, and everything that any model needs to be trained.

Shape letters: B batch, T/S query/key length, D model, N heads, K kv heads, H head dim, F ff, V vocab, P patches,
C patch features.
"""

import importlib

# Names load on first use: `import vishwamai` stays quick, and its parts can import each other in any order.
_HOME = {"VishwamAI": "vishwamai.pretrained", "VishwamAITokenizer": "vishwamai.tokenizer"}
__all__ = ["VishwamAI", "VishwamAITokenizer"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"vishwamai exports {', '.join(__all__)}; found {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
