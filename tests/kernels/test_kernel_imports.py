"""`kernels` shares its name with a Hugging Face package: importing it is free, and Transformers works beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_costs_nothing():
    script = "import kernels, sys; print(sorted({'jax', 'numpy'} & set(sys.modules)), hasattr(kernels, '__version__'))"
    assert run(script) == "[] False"


def test_the_exported_names():
    names = "['Mask', 'attention', 'decode_attention', 'grouped_matmul', 'route']"
    assert run("import kernels; print(dir(kernels))") == names
    with pytest.raises(AttributeError, match="exports Mask, .*decode_attention, grouped_matmul, route; found 'flash'"):
        import kernels

        kernels.flash  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        "import kernels.attention",
        "from kernels.grouped_matmul import xla",
        "from kernels.decode_attention import quantized",
        "import kernels",
    ],
)
def test_names_are_functions_whatever_was_imported_before(first):
    script = f"{first}\nfrom kernels import Mask, attention, decode_attention, grouped_matmul\n"
    script += "print(*(x.__module__ for x in (attention, decode_attention, grouped_matmul)))"
    assert run(script) == "kernels.attention.api kernels.decode_attention.api kernels.grouped_matmul.api"


def test_transformers_works_beside_it():
    pytest.importorskip("transformers")
    script = """
import kernels, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.import_utils import is_kernels_available
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, num_key_value_heads=1, **sizes))
print(tuple(model(torch.arange(6)[None]).logits.shape), is_kernels_available(), kernels.__file__)
"""
    assert run(script) == f"(1, 6, 32) False {ROOT / 'kernels' / '__init__.py'}"
