"""Block sizes for the attention kernels: each candidate's milliseconds, the best one last.

    python -m kernels.tune forward --chip v6e --length 4096 --heads 16 --kv-heads 8 --head-dim 128 --causal
    python -m kernels.tune forward --chip v6e --causal --documents 1300 500 1700 596          # packed rows
    python -m kernels.tune backward --length 4096 --causal --queries 512 1024 --keys 1024     # on a TPU: by the clock

With `--chip` the figure is the static estimate of that kernel alone (`kernels.static_estimate`; needs libtpu, no TPU);
without, the whole program is timed on the TPU that is here. What wins goes into the table of
`kernels/attention/tpu/tuning.py`, under its chip. Differences under a tenth of a static estimate mean nothing. Each
candidate takes the compiler ten seconds to minutes: name few of each side.

A shape needs no tuning to run: it takes the table's sizes for its kind of mask, in blocks cut evenly to its length.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import Mask, attention
from kernels.attention.tpu import tuning
from kernels.static_estimate import CHIPS, chip_process, compile_program, estimate, target
from kernels.static_estimate.attention import attention_geometry


class Problem(NamedTuple):
    """kernel: "forward" or "backward"; q: B T N H, k and v: B T K H, bf16; documents: lengths of the texts in a row."""

    kernel: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None
    documents: tuple[int, ...] | None = None

    @property
    def mask(self) -> Mask:
        ids = None
        if self.documents is not None:
            row = np.repeat(np.arange(1, len(self.documents) + 1, dtype=np.int32), self.documents)
            ids = np.broadcast_to(row, (self.batch, self.length))
        return Mask(causal=self.causal, window=self.window, q_segment_ids=ids)

    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        q, k = (
            jax.ShapeDtypeStruct((self.batch, self.length, heads, self.head_dim), jnp.bfloat16)
            for heads in (self.heads, self.kv_heads)
        )
        return q, k, k

    def function(self) -> Callable:
        def attend(q, k, v):
            return attention(q, k, v, self.mask, backend="tpu")

        def total(q, k, v):
            return attend(q, k, v).astype(jnp.float32).sum()

        return attend if self.kernel == "forward" else jax.grad(total, argnums=(0, 1, 2))


def candidates(options: argparse.Namespace) -> list[tuning.Sizes]:
    """Every combination whose tiles divide its blocks. The backward kernel takes one head a step, always."""
    sides = options.queries, options.keys, options.tile_queries, options.tile_keys
    heads = options.heads_per_step if options.kernel == "forward" else [1]
    found = [
        tuning.Sizes(queries, keys, tile_queries, tile_keys, *others)
        for queries, keys, tile_queries, tile_keys in itertools.product(*sides)
        for others in itertools.product(heads, {min(n, tile_keys) for n in options.diagonal_keys}, (True, False))
    ]
    return [
        sizes
        for sizes in found
        if sizes.queries % sizes.tile_queries == sizes.keys % sizes.tile_keys == sizes.keys % sizes.diagonal_keys == 0
    ]


def use(kernel: str, sizes: tuning.Sizes) -> None:
    """From here on the kernel takes these sizes, on any chip, for any mask."""
    for table in (tuning.DEFAULT, *tuning.CHIPS.values()):
        table |= {(name, kind): sizes for name, kind in tuning.DEFAULT if name == kernel}
    jax.clear_caches()


def estimated(problem: Problem, chip: str, sizes: tuning.Sizes) -> float:
    """Milliseconds of the problem's kernel; runs in the chip's process. Raises what `compile_program` raises."""
    use(problem.kernel, sizes)
    arrays = problem.arrays()
    program = compile_program(problem.function(), arrays)
    kernels = [kernel for kernel in program.kernels if kernel.name == f"attention_{problem.kernel}"]
    with target():
        geometries = [attention_geometry(kernel, *arrays, problem.mask) for kernel in kernels]
    found = [estimate(kernel, geometry, chip) for kernel, geometry in zip(kernels, geometries, strict=True)]
    return sum(one.milliseconds for one in found)


def timed(problem: Problem, sizes: tuning.Sizes, repeats: int = 20) -> float:
    """Milliseconds of the whole program on this machine's TPU, the median."""
    use(problem.kernel, sizes)
    return clock(jax.jit(problem.function()), problem.arrays(), repeats)


def clock(function: Callable, arrays: Sequence[Any], repeats: int) -> float:
    """Median milliseconds of a call on normal random arrays of those shapes, compiling left out."""
    keys = jax.random.split(jax.random.key(0), len(arrays))
    values = [jax.random.normal(key, array.shape, array.dtype) for key, array in zip(keys, arrays, strict=True)]
    jax.block_until_ready(function(*values))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*values))
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def ranked(figure: Callable[[Any], float], choices: Iterable[Any]) -> list[tuple[float, Any]]:
    """Each choice that has a figure, the smallest last; prints them as they come, also those that fail."""
    found = []
    for choice in choices:
        try:
            found.append((figure(choice), choice))
            print(f"{found[-1][0]:9.4f} ms  {choice}", flush=True)
        except Exception as error:
            print(f"{'failed':>12}  {choice}: {' '.join(str(error).split())[:160]}", flush=True)
    return sorted(found, key=lambda pair: -pair[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=("forward", "backward"))
    parser.add_argument("--chip", choices=CHIPS, help="estimate for it; without, time on the TPU that is here")
    for name, default in (("batch", 2), ("length", 4096), ("heads", 16), ("kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=int, help="with --causal")
    parser.add_argument("--documents", type=int, nargs="+", help="lengths of texts packed into each row; sets --length")
    parser.add_argument("--queries", type=int, nargs="+", default=[512, 1024, 2048], help="rows of a block")
    parser.add_argument("--keys", type=int, nargs="+", default=[512, 1024], help="keys of a block")
    parser.add_argument("--tile-queries", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tile-keys", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--heads-per-step", type=int, nargs="+", default=[1, 2, 4], help="of the forward kernel")
    parser.add_argument("--diagonal-keys", type=int, nargs="+", default=[256], help="keys of a tile on the diagonal")
    options = parser.parse_args()
    if options.documents is not None:
        options.documents, options.length = tuple(options.documents), sum(options.documents)
    problem = Problem(**{name: getattr(options, name) for name in Problem._fields})
    if options.chip is None:
        if jax.default_backend() != "tpu":
            parser.error("there is no TPU here: say for which --chip to estimate")
        found = ranked(lambda sizes: timed(problem, sizes), candidates(options))
    else:
        with chip_process(options.chip) as process:
            found = ranked(
                lambda sizes: process.submit(estimated, problem, options.chip, sizes).result(), candidates(options)
            )
    if not found:
        raise SystemExit("no candidate compiled: try smaller blocks")
    print(f"\n{problem}\nbest: {found[-1][0]:.4f} ms  {found[-1][1]!r}")


if __name__ == "__main__":
    main()
