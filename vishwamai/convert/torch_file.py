"""PyTorch's `.bin` files, read by PyTorch itself, and never more of a pickle than tensors."""

import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vishwamai.config import ConfigError
from vishwamai.convert.stored import DTYPES, Stored

_NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def open_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; reads what describes them, and maps the rest.

    Raises ConfigError where PyTorch is not installed, and for a file that is damaged, that holds anything but tensors
    by name, or whose pickle asks for anything else than tensors (which is refused, not run).
    """
    try:
        import torch  # an extra
    except ImportError:
        raise ConfigError(
            f"{path} can only be read with PyTorch: install it (pip install 'vishwamai[torch]'), or take the model as "
            "safetensors"
        ) from None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}" if asked else str(error).splitlines()[0]
        raise ConfigError(
            f"{path} is refused: its pickle is not one of tensors alone ({what}), and could run any code. Take the "
            "model as safetensors, from someone you trust"
        ) from None
    except Exception as error:  # PyTorch raises many kinds
        raise ConfigError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read by PyTorch ({str(error).splitlines()[0]}): fetch "
            "the file again; if PyTorch before 1.6 wrote it, load and save it once with a newer one"
        ) from None
    if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise ConfigError(f"{path} holds something else than tensors by name: expected a model's state_dict")
    return {
        name: Stored(
            path, tuple(tensor.shape), _NAMES.get(str(tensor.dtype), str(tensor.dtype)), partial(_read, tensor)
        )
        for name, tensor in held.items()
    }


def _read(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which NumPy has no name for
        return tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
    return tensor.numpy()
