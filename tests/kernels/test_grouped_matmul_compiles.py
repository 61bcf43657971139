"""The TPU kernels, compiled for real chips that are not here: nothing overflows, and nothing is dense."""

import jax
import jax.numpy as jnp
import pytest
from tpu_chips import CHIPS, compiled_for

from kernels import grouped_matmul
from kernels.grouped_matmul.quantized import QuantizedMatrices

pytestmark = pytest.mark.slow
# rows, D, F, E
SHAPES = {"Qwen3-30B-A3B": (65536, 2048, 768, 128), "odd": (1000, 100, 77, 5), "decode": (64, 2048, 768, 128)}


def arrays(shape, dtype):
    rows, inner, width, groups = shape
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    x, dy = (jax.ShapeDtypeStruct((rows, n), dtype) for n in (inner, width))
    return x, jax.ShapeDtypeStruct((groups, inner, width), dtype), sizes, dy


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_forward_and_backward(chip, shape):
    def run(x, w, sizes, dy):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, *back(dy)

    program = compiled_for(chip, run, *arrays(SHAPES[shape], jnp.bfloat16))
    assert program.as_text().count("tpu_custom_call") >= 3, "y, dx and dw"
    assert program.memory_analysis().temp_size_in_bytes < 2**26, "nothing is copied"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_gated(chip, shape):
    def run(x, gate, up, sizes, dy):
        y, back = jax.vjp(lambda x, gate, up: grouped_matmul(x, up, sizes, gate=gate), x, gate, up)
        return y, *back(dy)

    x, w, sizes, dy = arrays(SHAPES[shape], jnp.bfloat16)
    program = compiled_for(chip, run, x, w, w, sizes, dy)
    assert program.as_text().count("tpu_custom_call") == 3, "the forward, dx, and both matrices' gradients"
    assert program.memory_analysis().temp_size_in_bytes < 4 * dy.size * 2 + 2**26, "two products, and their gradients"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chip", CHIPS)
def test_matrices_transposed_and_quantized(chip, dtype):
    x, w, sizes, dy = arrays((4096, 512, 256, 16), dtype)

    def run(x, w, values, scales, sizes, dy):
        y, back = jax.vjp(lambda dy: grouped_matmul(dy, w, sizes, transpose_w=True), dy)
        small, small_back = jax.vjp(lambda x: grouped_matmul(x, QuantizedMatrices(values, scales), sizes), x)
        turned = QuantizedMatrices(values.swapaxes(1, 2), scales)
        again, again_back = jax.vjp(lambda x: grouped_matmul(x, turned, sizes, transpose_w=True), x)
        return y, *back(x), small, *small_back(dy), again, *again_back(dy)

    scales = jax.ShapeDtypeStruct((16, 256), jnp.float32)
    values = jax.ShapeDtypeStruct(w.shape, jnp.int8 if dtype == jnp.float32 else jnp.float8_e4m3fn)
    assert compiled_for(chip, run, x, w, values, scales, sizes, dy).as_text().count("tpu_custom_call") >= 6
