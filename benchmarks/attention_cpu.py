"""Attention on the CPU beside PyTorch's: forward and backward, one process, float32, in turns.

    python -m benchmarks.attention_cpu           # about 5 minutes on 2 cores; prints Markdown

    | forward + backward | ours, ms | PyTorch, ms | ratio |
    |---|---|---|---|
    | Qwen3, causal | 564 (541-610) | 494 (480-530) | 0.88 (0.64-0.91) |

Ours is the blocked XLA backend that "auto" takes there, theirs `scaled_dot_product_attention`; key heads that are fewer
than the query heads are repeated for it, or left to its `enable_gqa`, whichever is faster. Shown are medians and ranges
of the turns, and of the ratio in a turn, above 1 where ours is faster. Needs the `torch` extra. A machine that does
other work at the time tells nothing: look at the spread.
"""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.side_by_side import cpu_parser, in_turns, markdown, only_cores, seconds, spread

# ------------------------------------------------------------------ what runs where; before JAX and PyTorch start
parser = cpu_parser(__doc__, rounds=7)
parser.add_argument("--cases", default="", help="only those whose names hold this")
options = parser.parse_args()
only_cores(options.cores)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

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

Run = Callable[[], list[np.ndarray]]


def main() -> None:
    torch.set_num_threads(options.cores)
    print(f"{options.cores} cores, medians of {options.rounds}; jax {jax.__version__}, torch {torch.__version__}\n")
    rows = [(name, *row(case)) for name, case in CASES.items() if options.cases in name]
    print(markdown(("forward + backward", "ours, ms", "PyTorch, ms", "ratio"), rows))


def row(case: Case) -> tuple[str, ...]:
    """Of both and of their ratio in a turn."""
    rows, length, heads, kv_heads, width = case.shape
    rng = np.random.default_rng(0)
    shapes = (rows, length, heads, width), *[(rows, length, kv_heads, width)] * 2, (rows, length, heads, width)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    ours, theirs = run_ours(arrays, case), run_theirs(arrays, case)
    for mine, other in zip(ours(), theirs(), strict=True):  # compiles, too
        error = np.abs(mine - other).max() / np.abs(other).max()
        if not error <= SAME:
            raise SystemExit(f"the results differ by {error:.1e}: this is not the same attention")
    times = in_turns(ours, theirs, options.rounds)
    ratios = [other / mine for mine, other in zip(*times, strict=True)]
    return *(spread([1000 * x for x in own], digits=0) for own in times), spread(ratios)


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
    return min(forms, key=seconds)


if __name__ == "__main__":
    main()
