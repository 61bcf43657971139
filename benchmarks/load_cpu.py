"""Loading a checkpoint on the CPU beside Transformers: time and memory, each load in a process of its own, in turns.

    python -m benchmarks.load_cpu            # about 6 minutes on 2 cores; prints Markdown

    | 1.99 GB of float32 in the system's cache, 2 cores | load, s | whole process, s | memory / file |
    |---|---|---|---|
    | ours | 2.58 (2.41-2.77) | 4.54 | 1.01 |
    | Transformers | 0.24 (0.23-0.24) | 6.76 | 1.01 |
    | ratio | 10.75 | 0.67 | 1.00 |

The checkpoint is a Qwen3 of 2 GB with random weights, written by Transformers as safetensors into a temporary folder,
once in the system's cache and once not. A load lasts from the folder's name until every weight has been read once:
Transformers maps the file and reads it later, ours are turned into other arrays. `whole process` has Python's start
and the imports in it. Memory is the largest resident size of the process less that before the load, mapped pages
included. Needs the `torch` extra. A machine that does other work at the time tells nothing: look at the spread.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.side_by_side import cpu_parser, markdown, only_cores, spread

parser = cpu_parser(__doc__, rounds=3, turn="loads of each, in turns")
parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of file and model (default: both)")
parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: %(default)s)")
options = parser.parse_args()
only_cores(options.cores)

SIZES = dict(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
BESIDE_LAYERS, LAYER = 32_000 * 2048, 2048 * (3 * 6144 + 6144)  # parameters

MAKE = """
import json, sys, torch, transformers
torch.set_default_dtype(getattr(torch, sys.argv[2]))
config = transformers.Qwen3Config(**json.loads(sys.argv[3]))
transformers.Qwen3ForCausalLM(config).save_pretrained(sys.argv[1])
"""
OURS = """
import jax
from vishwamai import VishwamAI, families
jax.devices()
families.get("qwen3")

def load(folder, dtype):
    parameters = jax.tree.leaves(VishwamAI.from_pretrained(folder, dtype=dtype).parameters)
    return [parameter.block_until_ready() for parameter in parameters]

def read(parameter):
    import numpy as np
    np.bitwise_xor.reduce(np.asarray(parameter).reshape(-1).view(np.uint64))
"""
THEIRS = """
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from transformers import Qwen3ForCausalLM

def load(folder, dtype):
    return list(Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).parameters())

def read(parameter):
    import numpy as np
    np.bitwise_xor.reduce(parameter.detach().view(torch.uint8).numpy().reshape(-1).view(np.uint64))
"""
MEASURE = """
import sys, time

def memory(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind + ":"))

before, start = memory("VmRSS"), time.perf_counter()
kept = load(*sys.argv[1:])
for parameter in kept:
    read(parameter)
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


@dataclass(frozen=True)
class Load:
    seconds: float
    process: float
    memory: float


def main() -> None:
    codes = {"ours": OURS + MEASURE, "Transformers": THEIRS + MEASURE}
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            size = make(folder, dtype)
            for code in codes.values():
                measure(code, folder, dtype)  # modules get compiled
            for cached in (True, False):
                found = {name: [] for name in codes}
                for _ in range(options.rounds):
                    for name, code in codes.items():
                        if not cached:
                            evict(folder)
                        found[name].append(measure(code, folder, dtype))
                where = "in the system's cache" if cached else "on disk alone"
                report(found, f"{size / 1e9:.2f} GB of {dtype} {where}, {options.cores} cores", size)


def make(folder: str, dtype: str) -> int:
    """Writes the checkpoint; returns its bytes."""
    width = {"float32": 4, "bfloat16": 2}[dtype]
    layers = round((options.gigabytes * 1e9 / width - BESIDE_LAYERS) / LAYER)
    sizes = json.dumps({**SIZES, "num_hidden_layers": layers})
    subprocess.run([sys.executable, "-c", MAKE, folder, dtype, sizes], check=True, stderr=subprocess.DEVNULL)
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def evict(folder: str) -> None:
    """Drops the files from the system's cache."""
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on disk yet stays in the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(code: str, folder: str, dtype: str) -> Load:
    command = [sys.executable, "-c", code, folder, dtype]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.cores)}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, memory = map(float, done.stdout.split())
    return Load(seconds, time.perf_counter() - start, memory)


def report(found: dict[str, list[Load]], title: str, size: int) -> None:
    rows, medians = [], []
    for name, loads in found.items():
        process = statistics.median(load.process for load in loads)
        memory = max(load.memory for load in loads) / size
        seconds = [load.seconds for load in loads]
        medians.append((statistics.median(seconds), process, memory))
        rows.append((name, spread(seconds), f"{process:.2f}", f"{memory:.2f}"))
    rows.append(("ratio", *(f"{mine / other:.2f}" for mine, other in zip(*medians, strict=True))))
    print(markdown((title, "load, s", "whole process, s", "memory / file"), rows), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
