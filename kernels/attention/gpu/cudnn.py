"""Attention by cuDNN's fused kernel, through `jax.nn.dot_product_attention`, where that honours what is asked.

It has been lowered for CUDA and read, but never run: this project has had no GPU. What cuDNN promises nothing about is
refused, or kept from it: a query that sees no key, a text of other length than the keys' under a causal mask.
"""

import jax
import jax.numpy as jnp

from kernels.attention import xla
from kernels.attention.mask import Mask, clear_padding
from kernels.backends import left_to_xla

MAX_HEAD_DIM = 128  # on Hopper cuDNN takes 256, but JAX refuses them unless a Hopper GPU is in this machine


def refusal(q, k, v, mask: Mask, scale: float, logit_softcap: float | None, sinks) -> str | None:
    """Why cuDNN can't do this; None where it can."""
    if left_to_xla():
        return "JAX splits it over a mesh only where q, k and v lie alike: pass spec="
    if reason := _not_for_this_device():
        return reason
    (length, _, width), num_keys = q.shape[1:], k.shape[1]
    if q.dtype != jnp.bfloat16:
        return f"cuDNN's attention takes bfloat16, not {q.dtype}"
    if width > MAX_HEAD_DIM or width % 8 or v.shape[-1] != width:
        return f"head dims must be equal, multiples of 8 and at most {MAX_HEAD_DIM}, not {width} and {v.shape[-1]}"
    if logit_softcap is not None or sinks is not None:
        return "it knows no soft-cap and no sinks"
    for field in ("prefix_length", "q_segment_ids", "block_ids"):
        if getattr(mask, field) is not None:
            return f"it knows no {field}"
    if mask.causal and (length != num_keys or not isinstance(mask.q_offset, int) or mask.q_offset):
        return f"causal needs as many keys as queries and q_offset=0, not {length}, {num_keys} and {mask.q_offset}"
    if mask.window is not None and mask.kv_length is not None:
        return "behind kv_length a window shows a query nothing, about which cuDNN promises nothing"
    return None


def _not_for_this_device() -> str | None:
    """Of a GPU that is not here nothing is asked."""
    here = jax.devices()[0]
    if here.platform != "gpu" or jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None
    major, _, minor = getattr(here, "compute_capability", "").partition(".")
    if major.isdigit() and minor.isdigit() and int(major) >= 8:
        return None
    return f"it is for NVIDIA's GPUs of compute capability 8.0 (Ampere) and later, not for {here.device_kind!r}"


def attention(q, k, v, mask: Mask, scale: float, logit_softcap: None, sinks: None):
    """As `reference.attention`, for what is not refused."""
    # cuDNN's own log-sum-exp has no gradient and is rounded to bfloat16. This one vanishes where nobody reads it.
    _, lse = xla.attention(q, k, v, mask, scale, logit_softcap, sinks)
    lengths = None
    if mask.kv_length is not None:
        q, k, v = clear_padding(mask, q, k, v)
        kv_length = jnp.broadcast_to(jnp.asarray(mask.kv_length, jnp.int32), q.shape[:1])
        lengths = jnp.clip(kv_length, 1, k.shape[1])
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    if lengths is not None:  # rows without keys were given one
        out = jnp.where((kv_length > 0)[:, None, None, None], out, 0)
    return out, lse
