"""The Hopper kernels of grouped products, compiled by ptxas for an H100 that is not here."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from hopper import compiled_for_h100

import kernels
from kernels.grouped_matmul.quantized import QuantizedMatrices

pytestmark = pytest.mark.slow
grouped_matmul = partial(kernels.grouped_matmul, backend="mosaic_gpu")
# rows, D, F, E
SHAPES = {"Qwen3-30B-A3B": (65536, 2048, 768, 128), "odd": (1003, 192, 704, 5), "decode": (64, 2048, 768, 128)}


@pytest.fixture
def ptxas(monkeypatch, capfd):
    """What it said of each kernel since: registers, and bytes that were spilled."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def said():
        text = "".join(capfd.readouterr())
        registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
        spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", text)]
        assert "setmaxnreg' ignored" not in text and "serialization" not in text
        return registers, spilled

    return said


def arrays(shape, dtype=jnp.bfloat16, turned=False):
    rows, inner, width, groups = shape
    x, dy = (jax.ShapeDtypeStruct((rows, n), dtype) for n in (inner, width))
    w = jax.ShapeDtypeStruct((groups, width, inner) if turned else (groups, inner, width), dtype)
    return x, w, jax.ShapeDtypeStruct((groups,), jnp.int32), dy


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(ptxas, shape, turned):
    def run(x, w, sizes, dy):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, transpose_w=turned), x, w)
        return y, *back(dy)

    program = compiled_for_h100(run, *arrays(SHAPES[shape], turned=turned))
    registers, spilled = ptxas()
    assert len(registers) == 3, "y, dx and dw"
    assert max(registers) <= 168 and not any(spilled), "what three warpgroups may have at the start"
    assert program.memory_analysis().temp_size_in_bytes < 2**24, "nothing is copied, nothing made for every group"


def test_gated(ptxas):
    def run(x, gate, up, sizes, dy):
        y, back = jax.vjp(lambda x, gate, up: grouped_matmul(x, up, sizes, gate=gate), x, gate, up)
        return y, *back(dy)

    x, w, sizes, dy = arrays(SHAPES["Qwen3-30B-A3B"])
    program = compiled_for_h100(run, x, w, w, sizes, dy)
    assert not any(ptxas()[1])
    temporary = 2 * (4 * dy.size + x.size)
    assert program.memory_analysis().temp_size_in_bytes < temporary + 2**24, "two products, their gradients, one dx"


def test_quantized_and_float16(ptxas):
    x, w, sizes, dy = arrays((4096, 512, 256, 16), jnp.float16)

    def run(x, values, scales, sizes, dy):
        y, back = jax.vjp(lambda x: grouped_matmul(x, QuantizedMatrices(values, scales), sizes), x)
        return y, *back(dy)

    scales = jax.ShapeDtypeStruct((16, 256), jnp.float32)
    compiled_for_h100(run, x, jax.ShapeDtypeStruct(w.shape, jnp.int8), scales, sizes, dy)
    registers, spilled = ptxas()
    assert len(registers) == 2 and not any(spilled), "y and dx"
