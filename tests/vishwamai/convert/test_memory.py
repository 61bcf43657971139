"""What a process holds while it converts or loads: parts of the model, or its own shards of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hf_folders import model_config

from vishwamai import families
from vishwamai.convert.parameters import abstract_parameters, exported_tensors, state_path
from vishwamai.convert.weights import ShardWriter

SIZES = dict(hidden_size=512, vocab_size=2000, head_dim=64, num_attention_heads=8)
SPARSE = dict(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=512)
CASES = [
    pytest.param("qwen3", SIZES | dict(num_hidden_layers=32, intermediate_size=2048), id="dense"),
    pytest.param("qwen3_moe", SIZES | dict(num_hidden_layers=10, mixture=SPARSE), id="experts", marks=pytest.mark.slow),
    pytest.param(
        "qwen3", SIZES | dict(num_hidden_layers=96, intermediate_size=2048), id="large", marks=pytest.mark.slow
    ),
]
PARTS = 350e6  # bytes: what is on its way at one time, whatever the model's size
MEASURE = """
import ctypes, gc, sys, threading
import jax
from vishwamai import VishwamAI
from vishwamai.convert.from_hf import from_hf
from vishwamai.convert.to_hf import to_hf

def held(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind + ":"))

def peak(work):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the work before has freed
    before, found, over = held("RssAnon"), [], threading.Event()
    def watch():
        while not over.wait(0.003):
            found.append(held("RssAnon"))
    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    over.set()
    watcher.join()
    return max(found) - before, kept

source, folder = sys.argv[1:]
jax.devices()
for work in (
    lambda: from_hf(source, folder + "/run"),
    lambda: to_hf(folder + "/run", folder + "/back"),
    lambda: VishwamAI.from_pretrained(source),
    lambda: VishwamAI.from_pretrained(folder + "/run"),
):
    print(peak(work)[0])
"""


def write_large(folder: Path, family: str, changes: dict) -> int:
    """A checkpoint whose numbers don't compress well, written without being held. Returns its bytes."""
    config, layout = model_config(family, **changes), families.get(family).layout
    abstract = dict(nnx.to_flat_state(abstract_parameters(families.get(family).build, config)))
    noise = np.random.default_rng(0).normal(size=2**23).astype(np.float32)

    def fetch(path, layer):
        shape = abstract[state_path(path)].get_value().shape
        shape = shape if layer is None else shape[1:]
        return noise[: np.prod(shape)].reshape(shape)

    tensors = exported_tensors("test", layout.rows(config), fetch)
    folder.mkdir()
    writer = ShardWriter(folder, list(tensors), shard_bytes=10**8)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    (folder / "config.json").write_text(json.dumps(layout.write_config(config)))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("family, changes", CASES)
def test_conversion_holds_parts_and_loading_holds_the_model_once(tmp_path, family, changes):
    size = write_large(tmp_path / "source", family, changes)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "source"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    from_hf, to_hf, load, load_run = (int(line) for line in done.stdout.split())
    assert from_hf < PARTS < size
    assert to_hf < PARTS
    assert 0.9 * size < load < 1.1 * size
    assert 0.9 * size < load_run < 1.1 * size + PARTS
