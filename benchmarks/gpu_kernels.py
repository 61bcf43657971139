"""Our kernels on a GPU beside cuDNN's attention and XLA's grouped products: bfloat16, in turns, after a warm-up.

    python -m benchmarks.gpu_kernels                # some minutes on one GPU; prints Markdown

    | | ours, ms | peer, ms | ours / peer | aim |
    |---|---|---|---|---|
    | causal 4096, forward, auto | median (lowest-highest) | the same | ... | 1.11 |

No GPU has run this yet. Needs one, and the `cuda` extra.
Attention is `kernels.attention` by each backend that can do it, "auto" first, beside
`jax.nn.dot_product_attention(implementation="cudnn")`; a mask that cuDNN lacks is measured against its causal time, and
must agree with our XLA backend. "auto" takes kernels here that no GPU has run (`KERNELS_UNTRIED=1`): it is their trial.
The aims were set for Hopper: nine tenths of cuDNN's speed, and 1.2 times its time for masks that it lacks.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side_by_side import in_turns, markdown, spread
from kernels import Mask, attention, decode_attention, grouped_matmul
from kernels.backends import UNTRIED

BACKENDS = "auto", "cudnn", "mosaic_gpu", "xla"
CUDNN, LACKING = 1 / 0.9, 1.2  # aims: of its time
ERROR = 0.02  # by how much results in bfloat16 may differ, as a share of their norm


class Sizes(NamedTuple):
    """Of the problems; lengths: of causal rows, the first one also of other masks; experts: E, M, D, F."""

    lengths: tuple[int, ...] = (4096, 8192, 16384)
    heads: int = 16
    kv_heads: int = 8
    width: int = 128
    experts: tuple[int, int, int, int] = (32, 16384, 2048, 768)
    cache: tuple[int, int] = (8, 32768)  # rows, slots


class Case(NamedTuple):
    """Two functions of the same arrays; exact: what ours must agree with, None: the peer; aim: ours / peer, at most."""

    name: str
    ours: Callable
    peer: Callable
    arrays: tuple[Any, ...]
    aim: float | None = None
    exact: Callable | None = None


class Measured(NamedTuple):
    """Seconds of each call."""

    case: Case
    ours: list[float]
    peer: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(mine / other for mine, other in zip(self.ours, self.peer, strict=True))


def gradients(attend: Callable) -> Callable:
    """Of q, k, v and the result's gradient: the result, and the gradients of the three."""

    def run(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return run


def cases(sizes: Sizes, peer: str = "cudnn", backends: tuple[str, ...] = BACKENDS) -> Iterator[Case]:
    """All that is compared; `peer` is the implementation that jax.nn's attention takes."""
    normal = np.random.default_rng(0).standard_normal

    def array(*shape) -> jax.Array:
        return jnp.asarray(normal(shape, np.float32), jnp.bfloat16)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=peer)

    def ours(mask: Mask, backend: str = "auto", **options) -> Callable:
        return lambda q, k, v: attention(q, k, v, mask, backend=backend, **options)

    def row(length: int) -> tuple[jax.Array, ...]:
        heads = sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads
        return tuple(array(1, length, count, sizes.width) for count in heads)

    for length in sizes.lengths:
        arrays = row(length)
        for backend in backends:
            name, aim = f"causal {length}", CUDNN if backend == "auto" else None
            yield Case(f"{name}, forward, {backend}", ours(Mask(causal=True), backend), theirs, arrays[:3], aim)
            both = gradients(ours(Mask(causal=True), backend)), gradients(theirs)
            yield Case(f"{name}, forward and backward, {backend}", *both, arrays, aim)

    arrays, length = row(sizes.lengths[0]), sizes.lengths[0]
    ids = jnp.asarray(np.repeat([1, 2, 3, 4], length // 4)[None], jnp.int32)
    lacking = {
        "segments": dict(mask=Mask(causal=True, q_segment_ids=ids)),
        "segments and a window": dict(mask=Mask(causal=True, window=length // 4, q_segment_ids=ids)),
        "prefix": dict(mask=Mask(causal=True, prefix_length=length // 4)),
        "soft-cap": dict(mask=Mask(causal=True), logit_softcap=30.0),
        "sinks": dict(mask=Mask(causal=True), sinks=jnp.zeros(sizes.heads)),
    }
    for name, options in lacking.items():
        name, attend, exact = f"{name} {length}", ours(**options), ours(**options, backend="xla")
        yield Case(f"{name}, forward", attend, theirs, arrays[:3], LACKING, exact)
        both = gradients(attend), gradients(theirs)
        yield Case(f"{name}, forward and backward", *both, arrays, LACKING, gradients(exact))

    yield from _experts(sizes, array)
    yield _decoding(sizes, array, peer)


def _experts(sizes: Sizes, array: Callable) -> Iterator[Case]:
    experts, rows, inner, width = sizes.experts
    counts = np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts))
    arrays = array(rows, inner), array(experts, inner, width), jnp.asarray(counts, jnp.int32)
    yield Case("experts, forward", grouped_matmul, jax.lax.ragged_dot, arrays)

    def both(multiply: Callable) -> Callable:
        def run(x, w, group_sizes, dy):
            y, pull = jax.vjp(lambda x, w: multiply(x, w, group_sizes), x, w)
            return y, *pull(dy)

        return run

    arrays = *arrays, array(rows, width)
    yield Case("experts, forward and backward", both(grouped_matmul), both(jax.lax.ragged_dot), arrays)


def _decoding(sizes: Sizes, array: Callable, peer: str) -> Case:
    """Rows of half the cache's length to all of it. Each reads the layout that it wants: heads or slots first."""
    batch, slots = sizes.cache
    lengths = jnp.asarray(np.linspace(slots // 2, slots - 1, batch), jnp.int32)
    cache = [array(batch, sizes.kv_heads, slots, sizes.width) for _ in "kv"]

    def ours(q, k, v, lengths, *turned):
        return decode_attention(q, k, v, Mask(causal=True, q_offset=lengths))

    def theirs(q, k, v, lengths, *turned):
        seen = dict(query_seq_lengths=jnp.ones_like(lengths), key_value_seq_lengths=lengths + 1)
        return jax.nn.dot_product_attention(q, *turned, **seen, implementation=peer)

    arrays = array(batch, 1, sizes.heads, sizes.width), *cache, lengths, *(jnp.swapaxes(x, 1, 2) for x in cache)
    return Case(f"decoding, {slots} slots", ours, theirs, arrays)


def measure(case: Case, rounds: int, pause: float = 0.0) -> Measured | str:
    """Both compiled and run once, ours compared, then timed in turns; or why one of them does not run."""
    runs = []
    for function in (case.ours, case.peer, *(() if case.exact is None else (case.exact,))):
        compiled = jax.jit(function)
        runs.append(lambda compiled=compiled: jax.block_until_ready(compiled(*case.arrays)))
    try:
        results = [jax.tree.leaves(run()) for run in runs]
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for mine, other in zip(results[0], results[-1], strict=True):
        difference, size = (float(jnp.linalg.norm(x.astype(jnp.float32))) for x in (mine - other, other))
        if not difference <= ERROR * size:
            return f"the results differ by {difference / size:.1e} of their norm: these are not the same"
    return Measured(case, *in_turns(*runs[:2], rounds, pause))


def table(measured: list[Measured]) -> str:
    """In Markdown."""
    rows = []
    for one in measured:
        milliseconds = (spread([1e3 * x for x in numbers], 3) for numbers in (one.ours, one.peer))
        aim = f"{one.case.aim:.2f}" if one.case.aim else "-"
        rows.append((one.case.name, *milliseconds, f"{one.ratio:.2f}", aim))
    return markdown(("", "ours, ms", "peer, ms", "ours / peer", "aim"), rows)


def gpu() -> jax.Device:
    """The first one. Raises SystemExit: JAX finds none."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(
            f"found {device.device_kind} ({device.platform}), expected a GPU: run it on a machine that has one, with "
            "`pip install '.[cuda]'` and without JAX_PLATFORMS=cpu. On a CPU there is benchmarks.attention_cpu, "
            "for TPUs that are not here benchmarks.tpu_static"
        )
    return device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each (default: %(default)s)")
    parser.add_argument("--cases", default="", help="only those whose names hold this")
    options = parser.parse_args()
    device = gpu()
    os.environ.setdefault(UNTRIED, "1")
    client = device.client.platform_version.replace("\n", ", ")
    print(f"{device.device_kind}, jax {jax.__version__}, {client}; medians of {options.rounds}\n", flush=True)
    measured = []
    for case in cases(Sizes()):
        if options.cases not in case.name:
            continue
        found = measure(case, options.rounds)
        if isinstance(found, str):
            print(f"{case.name}: {found}", flush=True)
        else:
            measured.append(found)
    print(table(measured))


if __name__ == "__main__":
    main()
