"""The one entry point for a few new tokens against a long cache: checks what it is given and picks a backend."""

import functools

import jax.numpy as jnp
from jax import custom_jvp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kernels.attention.arguments import DTYPES, check
from kernels.attention.mask import Mask, in_int32
from kernels.attention.sharding import over_mesh
from kernels.backends import EVERYWHERE, Backend, choose, lazily
from kernels.decode_attention import reference, xla
from kernels.decode_attention.quantized import LARGEST, QuantizedVectors

_tpu = functools.partial(lazily, "kernels.decode_attention.tpu")
# In order of preference.
BACKENDS = {
    "tpu": Backend(("tpu",), _tpu("decode_attention"), _tpu("refusal")),
    "xla": Backend(EVERYWHERE, xla.decode_attention),
    "reference": Backend((), reference.decode_attention),
}


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedVectors,
    v: Float[Array, "B K S V"] | QuantizedVectors,
    mask: Mask | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    backend: str = "auto",
    spec: PartitionSpec | None = None,
) -> Float[Array, "B T N V"]:
    """`kernels.attention` for T new tokens, one or a few, against S cached ones: bound by reading the cache once.

    Three things differ. Keys and values lie heads first, as a cache keeps them for its reader: a layout that would
    have to be turned costs more than attention itself. They may be quantised (`kernels.decode_attention.quantized`),
    each vector with its own scale. And what no query of a row sees is as if it were not there, NaN included: free
    slots may hold anything. Query head n reads key head n // (N / K), keys are never repeated; a row that sees no key
    gives 0; sums are at least float32. There is no gradient.

    Args:
        mask: what each query sees, as in `kernels.attention`; None is everything. For rows of unequal lengths
            `Mask(causal=True, q_offset=lengths)`, where `lengths` (int `B`) were written before these T.
        scale, logit_softcap, sinks: as in `kernels.attention`.
        backend: "auto", "tpu" (Pallas), "xla" or "reference" (for tests).
        spec: how B, T and N of q lie on the mesh in context, as PartitionSpec(("data", "fsdp"), None, "tensor"); k, v
            and the mask lie accordingly and nothing is gathered. T is whole. None leaves it to XLA, which can't split
            a Pallas kernel.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, one that can't do what is asked, or a spec that does
            not fit the mesh or the shapes.
        TypeError: q of none of bfloat16, float32, float64; k or v neither of q's type nor quantised to int8 or
            float8_e4m3fn; a mask that is no `Mask`, or whose arrays hold no integers.
        NotImplementedError: somebody differentiates it.
    """
    mask = Mask() if mask is None else mask
    sinks = None if sinks is None else jnp.asarray(sinks)
    values = (x.values if isinstance(x, QuantizedVectors) else x for x in (k, v))
    check(q, *values, mask, logit_softcap, sinks, heads_first=True)
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be one of {', '.join(DTYPES)}, found {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        _check_type(name, x, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    run = functools.partial(_run, backend)
    if spec is not None:
        run = functools.partial(over_mesh, run, spec, heads_first=True)
    return _without_gradient(run, scale, logit_softcap, q, k, v, in_int32(mask), sinks).astype(q.dtype)


def _run(backend: str, *arguments):
    """On one device, whose share of the arguments decides the backend."""
    return choose("decode_attention", BACKENDS, backend, *arguments)(*arguments)


@functools.partial(custom_jvp, nondiff_argnums=(0, 1, 2))
def _without_gradient(run, scale, logit_softcap, q, k, v, mask, sinks):
    return run(q, k, v, mask, scale, logit_softcap, sinks)


@_without_gradient.defjvp
def _no_gradient(*arguments):
    raise NotImplementedError("decode_attention has no gradient: differentiate kernels.attention, which has")


def _check_type(name: str, x, dtype) -> None:
    if not isinstance(x, QuantizedVectors):
        if x.dtype != dtype:
            raise TypeError(
                f"{name} must be {dtype} as q is, or QuantizedVectors, found {x.dtype}: cast or quantize it first"
            )
    elif jnp.dtype(x.values.dtype).name not in LARGEST:
        raise TypeError(f"{name}'s values must be {' or '.join(LARGEST)}, found {x.values.dtype}: use quantize")
    elif x.scales.shape != x.values.shape[:-1]:
        raise ValueError(f"{name}'s scales must have shape {x.values.shape[:-1]}, found {x.scales.shape}")
