"""Arrays in, arrays out: the kernels both models stand on. Knows no model, no config, no Flax.

Shape letters: B batch, T/S query/key length, N query heads, K key heads, H head dim, E experts.

Names load on first use: Transformers looks for a Hugging Face package that is also called `kernels` and imports what
it finds under that name. That must cost nothing, and must carry no `__version__` that Transformers would act on.
"""

import importlib

# Folders share their names with the functions they export. Importing the (empty) folders first and dropping the names
# lets `from kernels import attention` give the function, whichever module was imported before.
import kernels.attention
import kernels.decode_attention
import kernels.grouped_matmul

del attention, decode_attention, grouped_matmul, kernels  # noqa: F821

_HOME = {
    "Mask": "kernels.attention.mask",
    "attention": "kernels.attention.api",
    "decode_attention": "kernels.decode_attention.api",
    "grouped_matmul": "kernels.grouped_matmul.api",
    "route": "kernels.router",
}
__all__ = ["Mask", "attention", "decode_attention", "grouped_matmul", "route"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"kernels exports {', '.join(__all__)}; found {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
