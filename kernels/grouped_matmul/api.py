"""The one entry point for products of sorted rows with one matrix per group."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.backends import EVERYWHERE, Backend, choose, lazily
from kernels.grouped_matmul import quantized, reference, xla
from kernels.grouped_matmul.quantized import QuantizedMatrices
from kernels.varying import alike

_tpu = partial(lazily, "kernels.grouped_matmul.tpu.backend")
_gpu = partial(lazily, "kernels.grouped_matmul.gpu.backend")


def _dequantized(run: Callable):
    """For a backend that knows no quantized matrices: all of them are widened, and get no gradient."""

    def widened(x, matrices, group_sizes, transpose_w, activation):
        matrices = tuple(
            jax.lax.stop_gradient(w).dequantized(transpose_w, x.dtype) if isinstance(w, QuantizedMatrices) else w
            for w in matrices
        )
        return run(x, matrices, group_sizes, transpose_w, activation)

    return widened


# In order of preference.
BACKENDS = {
    "tpu": Backend(("tpu",), _tpu("grouped_matmul"), _tpu("refusal")),
    "mosaic_gpu": Backend(("gpu",), _dequantized(_gpu("grouped_matmul")), _gpu("refusal"), untried=True),
    "xla": Backend(EVERYWHERE, _dequantized(xla.grouped_matmul)),
    "reference": Backend((), _dequantized(reference.grouped_matmul)),
}


def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"] | QuantizedMatrices,
    group_sizes: Int[Array, " E"],
    *,
    transpose_w: bool = False,
    gate: Float[Array, "E D F"] | QuantizedMatrices | None = None,
    activation: Callable[[Array], Array] = jax.nn.silu,
    backend: str = "auto",
) -> Float[Array, "M F"]:
    """The rows of x, sorted by group, each times its group's matrix: the first group_sizes[0] rows times w[0], ...

    Sums are at least float32, the result has x's type. Rows behind the last group give 0 and get no gradient; a group
    without rows has a gradient of exactly 0. Of sizes that sum to more than M, what is too much counts for nothing.
    There are first derivatives only. On a mesh call it in a `jax.shard_map` over rows, with `check_vma=False`, as else
    XLA's backend is taken.

    Args:
        w: or `kernels.grouped_matmul.quantized.QuantizedMatrices`: 8 bits with scales. Those get no gradient, x does.
        transpose_w: w is E F D, and its matrices are used transposed.
        gate: as w, of the same kind. The result is then activation(x @ gate) * (x @ w): SwiGLU (Shazeer 2020), from
            one reading of x where the backend can.
        activation: of single numbers, traced by JAX; one and the same function compiles once.
        backend: "auto", "tpu" (Pallas: bfloat16 or float32 rows), "mosaic_gpu" (Pallas for Hopper: bfloat16 or float16
            rows, sides that are multiples of 64), "xla" (blocks of rows: work grows with the rows there are) or
            "reference" (for tests).

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or one that can't do what is asked.
        TypeError: rows or matrices that are no floats, group sizes that are no integers, quantized values that are none
            of 8 bits, a gate of another kind.
    """
    group_sizes = jnp.asarray(group_sizes)
    shape = w.values.shape if isinstance(w, QuantizedMatrices) else w.shape
    found = f"found x {x.shape}, w {shape}"
    if x.ndim != 2 or len(shape) != 3 or x.shape[1] != shape[2 if transpose_w else 1]:
        raise ValueError(f"x must be M D and w {'E F D' if transpose_w else 'E D F'}, {found}")
    if group_sizes.shape != shape[:1]:
        raise ValueError(
            f"group_sizes must hold one number for each of w's matrices, found {group_sizes.shape}, {found}"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes must be integers, found {group_sizes.dtype}")
    group_sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, x.shape[0])  # so that sums of them fit
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must hold floats, found {x.dtype}: cast it first")
    matrices = (w,) if gate is None else (gate, w)
    if gate is not None and (mine := _kind(gate)) != (its := _kind(w)):
        raise TypeError(f"gate must be as w is, found {mine}, w {its}")
    for each in matrices:
        if isinstance(each, QuantizedMatrices):
            quantized.check(each, transpose_w)
        elif not jnp.issubdtype(each.dtype, jnp.floating):
            raise TypeError(f"matrices must be floats or QuantizedMatrices, found {each.dtype}")
    x, matrices, group_sizes = alike((x, matrices, group_sizes))
    arguments = x, matrices, group_sizes, transpose_w, None if gate is None else activation
    return choose("grouped_matmul", BACKENDS, backend, *arguments)(*arguments).astype(x.dtype)


def _kind(w) -> str:
    values, quantized = (w.values, "quantized ") if isinstance(w, QuantizedMatrices) else (w, "")
    return f"{quantized}{values.dtype} {values.shape}"
