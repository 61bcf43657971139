"""The one entry point for attention: checks what it is given, picks a backend, says once which."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kernels.attention import reference, sharding, tpu, xla
from kernels.attention.arguments import DTYPES, check
from kernels.attention.gpu import cudnn, mosaic
from kernels.attention.mask import Mask, in_int32
from kernels.backends import EVERYWHERE, Backend, choose
from kernels.varying import alike

# In order of preference.
BACKENDS = {
    "tpu": Backend(("tpu",), tpu.attention, tpu.refusal),
    "cudnn": Backend(("gpu",), cudnn.attention, cudnn.refusal),
    "mosaic_gpu": Backend(("gpu",), mosaic.attention, mosaic.refusal, untried=True),
    "xla": Backend(EVERYWHERE, xla.attention),
    "reference": Backend((), reference.attention),
}


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    spec: PartitionSpec | None = None,
    max_logit: Float[Array, ""] | float | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Softmax attention with grouped heads: query head n reads key head n // (N / K), keys are never repeated.

    A row that sees no key gives 0 and zero gradients. Statistics and sums are at least float32.

    Args:
        mask: what each query sees (`kernels.Mask`); None is full attention.
        scale: factor of the logits; None is 1 / sqrt(H).
        logit_softcap: c gives c · tanh(logit / c), after the scale (Gemma 2, arXiv 2408.00118).
        sinks: one logit per head that joins the softmax and carries no value (attention sinks, arXiv 2309.17453).
        return_lse: also give the log of the softmax's denominator, sinks included; -inf where there is none.
        backend: "auto", "tpu" (Pallas), "cudnn" (GPU), "mosaic_gpu" (Pallas, Hopper GPUs), "xla" (blocked: memory
            grows with T, not T · S) or "reference" (for tests).
        spec: how B, T and N of q lie on the mesh in context, as PartitionSpec(("data", "fsdp"), "context", "tensor");
            k, v and the mask lie accordingly and nothing is gathered. An axis for T splits S too, and makes a ring
            (`ring.py`). None leaves it to XLA, which can't split a Pallas kernel.
        max_logit: what no |logit| exceeds, after scale and soft cap, where that is known: with normalised q and k of
            gains g it is H · max |g_q| · max |g_k| · scale, rotary or not. Up to `tpu.tile.MAX_LOGIT` the TPU's forward
            then keeps no running maximum: faster, and in bfloat16 with 1.2 to 1.4 times the rounding error, as no
            weight is an exact 1. Above, on other backends and in a ring it changes nothing; it has no gradient. One
            that is not true may overflow.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, one that can't do what is asked, or a spec that does
            not fit the mesh or the shapes.
        TypeError: q, k and v of different types, or none of bfloat16, float32, float64; a mask that is no `Mask`, or
            whose arrays hold no integers.
    """
    mask = Mask() if mask is None else mask
    sinks = None if sinks is None else jnp.asarray(sinks)
    check(q, k, v, mask, logit_softcap, sinks)
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise TypeError(
            f"q, k and v must all be one of {', '.join(DTYPES)}, found {q.dtype}, {k.dtype}, {v.dtype}: cast them first"
        )
    if max_logit is not None and np.shape(max_logit):
        raise ValueError(
            f"max_logit must be one number for all heads, found shape {np.shape(max_logit)}: take the highest"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = q, k, v, in_int32(mask), scale, logit_softcap, sinks
    ring = spec is not None and len(spec) > 1 and spec[1] is not None
    # A ring holds what it runs from its forward to its backward, where a traced number may not travel along.
    max_logit = None if max_logit is None or ring else jnp.asarray(max_logit, jnp.float32)
    run = functools.partial(_run, backend, max_logit)
    out, lse = run(*arguments) if spec is None else sharding.over_mesh(run, spec, *arguments)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def _run(backend: str, max_logit, q, k, v, mask, scale, logit_softcap, sinks):
    """On one device, whose share of the arguments decides the backend."""
    q, k, v, mask, sinks, max_logit = alike((q, k, v, mask, sinks, max_logit))
    arguments = q, k, v, mask, scale, logit_softcap, sinks
    run = choose("attention", BACKENDS, backend, *arguments)
    return run(*arguments, max_logit) if run is tpu.attention else run(*arguments)
