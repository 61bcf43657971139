"""Cached greedy decoding on the CPU beside Transformers' `generate`: one model, one process, float32, in turns.

    python -m benchmarks.generate_cpu            # about 3 minutes on 2 cores; prints Markdown

    | batch | ours, tokens/s | Transformers, tokens/s | ratio | equal tokens |
    |---|---|---|---|---|
    | 1 | 57 (57-65) | 28 (25-28) | 2.08 | 100.0% |

The model is a Qwen3 of 100 M parameters with random weights; a call answers prompts of 64 tokens with 128 more. Each
timing is a whole call, prefill included and compilation not. Needs the `torch` extra. A machine that does other work
at the time tells nothing: look at the spread.
"""

import statistics
import tempfile
from collections.abc import Callable

from benchmarks.side_by_side import cpu_parser, in_turns, markdown, only_cores, spread

# ------------------------------------------------------------------ what runs where; before JAX and PyTorch start
parser = cpu_parser(__doc__, rounds=5, turn="calls of each, in turns")
parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="prompts per call (default: 1 8)")
parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
parser.add_argument("--new-tokens", type=int, default=128, help="tokens that follow (default: %(default)s)")
options = parser.parse_args()
only_cores(options.cores)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from vishwamai import VishwamAI  # noqa: E402
from vishwamai.data.batch import text_batch  # noqa: E402
from vishwamai.generation import generate  # noqa: E402

VOCABULARY = 32_000


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
    print(f"{size:.0f} M parameters, {work}, {options.cores} cores; {versions}\n", flush=True)
    rows = [row(run_ours, run_theirs, batch) for batch in options.batch]
    print(markdown(("batch", "ours, tokens/s", "Transformers, tokens/s", "ratio", "equal tokens"), rows))


def row(ours: Callable, theirs: Callable, batch: int) -> tuple[str, ...]:
    """Of both on the same prompts: once to warm up, then in turns."""
    ids = np.random.default_rng(batch).integers(1, VOCABULARY, (batch, options.prompt))
    equal = np.mean(ours(ids) == theirs(ids))
    times = in_turns(lambda: ours(ids), lambda: theirs(ids), options.rounds)
    speeds = [[batch * options.new_tokens / seconds for seconds in own] for own in times]
    ratio = statistics.median(speeds[0]) / statistics.median(speeds[1])
    return str(batch), *(spread(own, digits=0) for own in speeds), f"{ratio:.2f}", f"{equal:.1%}"


if __name__ == "__main__":
    main()
