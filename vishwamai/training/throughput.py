"""How fast training is: floating-point operations of a step, the chip's peak, and memory in use."""

import resource
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx

from vishwamai.data.batch import Batch
from vishwamai.models.config import TextConfig
from vishwamai.training.optimizer import path_name
from vishwamai.training.step import TrainState

# Dense bfloat16 TFLOP/s of one JAX device, from the vendors' data sheets; the longest prefix of `device_kind` counts.
PEAK_TFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU7x": 2307 / 2,  # a chip shows as two devices
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
}


def peak_flops(device: Any) -> float | None:
    """Peak of one device in FLOP/s, or None where it isn't known."""
    fitting = [kind for kind in PEAK_TFLOPS if device.device_kind.startswith(kind)]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None


def flops_per_step(abstract: TrainState, text: TextConfig, batch: Batch) -> float:
    """Model FLOPs of a step: 6 per matrix parameter and position, 12 L N H T per token for attention's products.

    Chowdhery et al. 2022 (PaLM), appendix B; half of the attention term, as its mask is causal. Nothing recomputed
    is counted. The decoder's matrices see tokens, any others patches. A frozen matrix saves its own gradient: 4 of 6
    in the decoder, and outside it also the one that passes through: 2 of 6.
    """
    tokens = batch.tokens.size
    patches = batch.patches.shape[0] * batch.patches.shape[1] if batch.patches is not None else 0
    total = 6 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * batch.tokens.shape[1] * tokens
    decoder = ("layers.", "lm_head.", "language_model.layers.", "language_model.lm_head.")
    embeddings = ("embed_tokens.embedding", "language_model.embed_tokens.embedding")
    for state, trains in ((abstract.trainable, True), (abstract.frozen, False)):
        for path, variable in nnx.to_flat_state(state):
            name, shape = path_name(path), variable.get_value().shape
            if not isinstance(variable, nnx.Param) or len(variable.axes) < 2:
                continue
            if name in embeddings and not text.tie_word_embeddings:
                continue  # a look-up is no product
            in_decoder = name.startswith(decoder) or name in embeddings
            factor = 6 if trains else 4 if in_decoder else 2
            if variable.axes[0] == "expert":  # a token sees few of them
                factor *= text.mixture.num_experts_per_tok / text.mixture.num_experts
            total += factor * int(np.prod(shape)) * (tokens if in_decoder else patches)
    return float(total)


def memory_gb() -> float:
    """Gigabytes in use: of the fullest local device where the platform counts them, else the process's peak."""
    used = [stats["bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    if used:
        return max(used) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
