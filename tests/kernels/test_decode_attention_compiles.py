"""The decoding kernel, compiled by the real TPU compiler for four chips: every width, cache and length fits."""

import jax
import jax.numpy as jnp
import pytest
from tpu_chips import CHIPS, compiled_for

from kernels import Mask, decode_attention
from kernels.decode_attention.quantized import QuantizedVectors

pytestmark = pytest.mark.slow
BFLOAT16, INT8, FLOAT8 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn


def cache(batch, kv_heads, slots, width, dtype):
    values = jax.ShapeDtypeStruct((batch, kv_heads, slots, width), dtype)
    if dtype not in (INT8, FLOAT8):
        return values
    return QuantizedVectors(values, jax.ShapeDtypeStruct(values.shape[:-1], jnp.float32))


def decoding(batch, queries, heads, kv_heads, slots, width, v_width=None, dtype=BFLOAT16, kept=None, **options):
    """The function and the shapes that it takes: a ragged batch."""
    q = jax.ShapeDtypeStruct((batch, queries, heads, width), dtype)
    k, v = (cache(batch, kv_heads, slots, size, kept or dtype) for size in (width, v_width or width))
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def run(q, k, v, lengths):
        return decode_attention(q, k, v, Mask(causal=True, q_offset=lengths), backend="tpu", **options)

    return run, q, k, v, lengths


SHAPES = {
    "Qwen3": dict(batch=8, queries=1, heads=16, kv_heads=8, slots=32_768, width=128),
    "Qwen3, int8": dict(batch=8, queries=1, heads=16, kv_heads=8, slots=32_768, width=128, kept=INT8),
    "Qwen3, float8": dict(batch=8, queries=1, heads=16, kv_heads=8, slots=32_768, width=128, kept=FLOAT8),
    "many rows": dict(batch=64, queries=1, heads=16, kv_heads=8, slots=4096, width=128),
    "128k": dict(batch=2, queries=1, heads=32, kv_heads=8, slots=131_072, width=128),
    "128k, 16 proposals": dict(batch=2, queries=16, heads=32, kv_heads=8, slots=131_072, width=128),
    "one key head, 16 proposals": dict(batch=2, queries=16, heads=64, kv_heads=1, slots=8192, width=128),
    "no group": dict(batch=2, queries=2, heads=32, kv_heads=32, slots=4096, width=128, kept=INT8),
    "odd": dict(batch=3, queries=5, heads=6, kv_heads=3, slots=1001, width=72, v_width=40, logit_softcap=30.0),
    "short": dict(batch=1, queries=1, heads=2, kv_heads=1, slots=17, width=64),
    "float32": dict(batch=2, queries=2, heads=16, kv_heads=8, slots=4096, width=128, dtype=jnp.float32),
    "float32, int8": dict(batch=2, queries=2, heads=6, kv_heads=6, slots=500, width=64, dtype=jnp.float32, kept=INT8),
    **{
        f"{width} wide": dict(batch=2, queries=3, heads=8, kv_heads=4, slots=131_072, width=width, v_width=v_width)
        for width, v_width in ((64, 64), (72, 72), (80, 80), (96, 96), (192, 128), (256, 256))
    },
}


# Every shape for one chip, some for the others.
CASES = [(chip, shape) for chip in CHIPS for shape in (SHAPES if chip == "v5e" else ("Qwen3", "Qwen3, int8", "odd"))]


@pytest.mark.parametrize("chip, shape", CASES)
def test_it_compiles_and_copies_no_cache(chip, shape):
    f, *shapes = decoding(**SHAPES[shape])
    program = compiled_for(chip, f, *shapes)
    assert "decode_attention" in program.as_text()
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes[1:]))
    assert program.memory_analysis().temp_size_in_bytes < max(read / 8, 2**20)


def test_what_the_kernel_refuses_goes_to_xla():
    chip = "v5e"
    f, *shapes = decoding(batch=1, queries=32, heads=2, kv_heads=2, slots=256, width=128)
    with pytest.raises(ValueError, match="at most 31 new tokens, found 32: kernels.attention is for more"):
        compiled_for(chip, f, *shapes)
    assert "tpu_custom_call" not in compiled_for(chip, lambda *x: decode_attention(*x), *shapes[:3]).as_text()
    assert "tpu_custom_call" in compiled_for(chip, lambda q, *x: decode_attention(q[:, :1], *x), *shapes[:3]).as_text()
