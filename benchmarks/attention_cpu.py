"""Attention on the CPU beside PyTorch's: forward and backward, one process, float32, in turns.

    python benchmarks/attention_cpu.py           # about 5 minutes on 2 cores

Ours is the blocked XLA backend that "auto" takes there, theirs `scaled_dot_product_attention`; key heads that are fewer
than the query heads are repeated for it, or left to its `enable_gqa`, whichever is faster. Needs the `torch` extra. A
machine that does other work at the time tells nothing: look at the spread.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

# ------------------------------------------------------------------ what runs where; before JAX and PyTorch start
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cores", type=int, default=2, help="CPU cores that both may use (default: %(default)s)")
parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
parser.add_argument("--cases", default="", help="only those whose names hold this")
options = parser.parse_args()
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.box import SIMPLE_HEAD  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from kernels import Mask, attention  # noqa: E402


class Case(NamedTuple):
    """Rows, tokens, heads, key heads and head dim."""

    shape: tuple[int, int, int, int, int]
    causal: bool


CASES = {
    "Qwen3, causal": Case((1, 2048, 16, 8, 128), True),
    "Qwen3, full": Case((1, 2048, 16, 8, 128), False),
    "SigLIP so400m, 2048 patches": Case((1, 2048, 16, 16, 72), False),
    "SigLIP so400m, 2 x 1024 patches": Case((2, 1024, 16, 16, 72), False),
    "heads of 64, causal": Case((1, 2048, 16, 4, 64), True),
}
SAME = 1e-4  # by how much the gradients may differ, of the largest value
PAUSE = 0.5  # seconds between turns: PyTorch's threads spin for a while after theirs

Run = Callable[[], list[np.ndarray]]


def main() -> None:
    torch.set_num_threads(options.cores)
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    table = Table(title=f"milliseconds, {options.cores} cores; {versions}", title_style="", box=SIMPLE_HEAD)
    for column in ("forward + backward", "ours", "PyTorch", "ratio", "lowest", "highest"):
        table.add_column(column, justify="left" if column.startswith("forward") else "right")
    for name, case in CASES.items():
        if options.cases in name:
            table.add_row(name, *row(case))
    Console(width=100).print(table)


def row(case: Case) -> list[str]:
    """Medians of both and of their ratio in a turn, above 1 where ours is faster."""
    rows, length, heads, kv_heads, width = case.shape
    rng = np.random.default_rng(0)
    shapes = (rows, length, heads, width), *[(rows, length, kv_heads, width)] * 2, (rows, length, heads, width)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    ours, theirs = run_ours(arrays, case), run_theirs(arrays, case)
    for mine, other in zip(ours(), theirs(), strict=True):  # compiles, too
        error = np.abs(mine - other).max() / np.abs(other).max()
        if error > SAME:
            raise SystemExit(f"the results differ by {error:.1e}: this is not the same attention")
    turns = [(rested(ours), rested(theirs)) for _ in range(options.rounds)]
    ratios = [other / mine for mine, other in turns]
    medians = [f"{1000 * statistics.median(own):.0f}" for own in zip(*turns, strict=True)]
    return [*medians, *(f"{f(ratios):.2f}" for f in (statistics.median, min, max))]


def rested(run: Run) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def run_ours(arrays: list[np.ndarray], case: Case) -> Run:
    *qkv, d_out = (jax.device_put(x) for x in arrays)

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(lambda *x: attention(*x, Mask(causal=case.causal)), q, k, v)
        return out, *pull(d_out)

    return lambda: [np.asarray(x) for x in jax.block_until_ready(both(*qkv, d_out))]


def run_theirs(arrays: list[np.ndarray], case: Case) -> Run:
    *qkv, d_out = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays)
    group = qkv[0].shape[1] // qkv[1].shape[1]

    def run(**gqa) -> list[np.ndarray]:
        q, k, v = leaves = [x.detach().requires_grad_() for x in qkv]
        if group > 1 and not gqa:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal, **gqa)
        out.backward(d_out)
        return [x.detach().transpose(1, 2).numpy() for x in (out, *(leaf.grad for leaf in leaves))]

    if group == 1:
        return run
    forms = [run, lambda: run(enable_gqa=True)]
    for form in forms:
        form()
    return min(forms, key=rested)


if __name__ == "__main__":
    main()
