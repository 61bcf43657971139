"""Cached greedy decoding on the CPU beside Transformers' `generate`: one model, one process, float32, in turns.

    python benchmarks/generate_cpu.py            # about 3 minutes on 2 cores

The model is a Qwen3 of 100 M parameters with random weights; a call answers prompts of 64 tokens with 128 more. Each
timing is a whole call, prefill included and compilation not. Needs the `torch` extra. A machine that does other work
at the time tells nothing: look at the spread.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

# ------------------------------------------------------------------ what runs where; before JAX and PyTorch start
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cores", type=int, default=2, help="CPU cores that both may use (default: %(default)s)")
parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="prompts per call (default: 1 8)")
parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
parser.add_argument("--new-tokens", type=int, default=128, help="tokens that follow (default: %(default)s)")
parser.add_argument("--repeats", type=int, default=5, help="calls of each, in turns (default: %(default)s)")
options = parser.parse_args()
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from rich.box import SIMPLE_HEAD  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from vishwamai import VishwamAI  # noqa: E402
from vishwamai.data.batch import text_batch  # noqa: E402
from vishwamai.generation import generate  # noqa: E402

VOCABULARY = 32_000
PAUSE = 0.5  # seconds between calls: PyTorch's threads spin for a while after theirs


@dataclass(frozen=True)
class Timed:
    tokens_per_second: list[float]
    tokens: np.ndarray

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    @property
    def text(self) -> str:
        return f"{self.median:.0f} ({min(self.tokens_per_second):.0f}-{max(self.tokens_per_second):.0f})"


def main() -> None:
    torch.set_num_threads(options.cores)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = VishwamAI.from_pretrained(folder)

    def run_ours(ids: np.ndarray) -> np.ndarray:
        batch = text_batch(ids)
        room = dict(max_new_tokens=options.new_tokens, end_ids=[], pad_id=0)
        return generate(ours.graph, ours.parameters, batch, **room)

    def run_theirs(ids: np.ndarray) -> np.ndarray:
        room = dict(max_new_tokens=options.new_tokens, do_sample=False)
        return theirs.generate(torch.tensor(ids), **room)[:, ids.shape[1] :].numpy()

    size = sum(parameter.numel() for parameter in theirs.parameters()) / 1e6
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    work = f"{options.prompt} + {options.new_tokens} tokens"
    title = f"{size:.0f} M parameters, {work}, {options.cores} cores; {versions}"
    table = Table(title=title, title_style="", box=SIMPLE_HEAD)
    for column in ("batch", "ours, tokens/s", "Transformers, tokens/s", "ratio", "equal tokens"):
        table.add_column(column, justify="right")
    for rows in options.batch:
        ids = np.random.default_rng(rows).integers(1, VOCABULARY, (rows, options.prompt))
        mine, other = in_turns(run_ours, run_theirs, ids)
        equal = f"{np.mean(mine.tokens == other.tokens):.1%}"
        table.add_row(str(rows), mine.text, other.text, f"{mine.median / other.median:.2f}", equal)
    Console(width=max(len(title), 80)).print(table)


def in_turns(first: Callable, second: Callable, ids: np.ndarray) -> tuple[Timed, Timed]:
    """Both on the same prompts: once to warm up, then one after the other, `repeats` times."""
    runs = (first, second)
    tokens = [run(ids) for run in runs]
    speeds: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.repeats):
        for run, speed in zip(runs, speeds, strict=True):
            time.sleep(PAUSE)
            start = time.perf_counter()
            run(ids)
            speed.append(len(ids) * options.new_tokens / (time.perf_counter() - start))
    return Timed(speeds[0], tokens[0]), Timed(speeds[1], tokens[1])


if __name__ == "__main__":
    main()
