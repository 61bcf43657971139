"""The TPU's attention kernels, compiled by its own compiler for chips that are not here: a small set of all there is.

More shapes, and how long they take: `python -m benchmarks.tpu_static`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_chips import CHIPS, compiled_for

from kernels import Mask, attention
from kernels.attention import tpu

pytestmark = pytest.mark.slow


def compiled(chip: str, batch, heads, kv_heads, queries, keys, width, v_width, mask: Mask, dtype="bfloat16", **options):
    """The gradient of one call."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    qkv = (
        array(batch, queries, heads, width),
        array(batch, keys, kv_heads, width),
        array(batch, keys, kv_heads, v_width),
    )
    sinks = array(heads, dtype=jnp.float32) if options.pop("sinks", False) else None
    mask = jax.tree.map(lambda x: array(*x.shape, dtype=jnp.int32), mask)

    def both(q, k, v, mask, sinks):
        assert tpu.refusal(q, k, v, mask, 0.1, None, sinks) is None
        out, lse = tpu.attention(q, k, v, mask, 0.1, options.get("softcap"), sinks)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    return compiled_for(chip, jax.grad(both, (0, 1, 2) if sinks is None else (0, 1, 2, 4)), *qkv, mask, sinks)


WIDTHS = [(64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
CASES = [("v5e", widths) for widths in WIDTHS] + [
    (chip, (width, width)) for chip in ("v5p", "v6e", "tpu7x") for width in (72, 128)
]


@pytest.mark.parametrize("chip, widths", CASES, ids=str)
def test_head_dims(chip, widths):
    compiled(chip, 1, 4, 2, 2048, 2048, *widths, Mask(causal=True))


EVERY_MASK = Mask(
    causal=True,
    window=700,
    prefix_length=np.zeros(2, int),
    q_segment_ids=np.zeros((2, 1500), int),
    kv_length=np.zeros(2, int),
    block_ids=np.zeros((2, 1500), int),
)


@pytest.mark.parametrize("chip", CHIPS)
def test_everything_at_once(chip):
    compiled(chip, 2, 4, 2, 1500, 1500, 72, 72, EVERY_MASK, sinks=True, softcap=30.0)
    compiled(chip, 2, 4, 4, 5, 729, 64, 64, Mask(causal=True, q_offset=np.zeros(2, int)), dtype="float32")


def test_a_long_row_needs_no_square_buffer():
    length, width = 32 * 1024, 128
    mask = Mask(causal=True, q_segment_ids=np.zeros((1, length), int))
    memory = compiled("v5e", 1, 2, 1, length, length, width, width, mask).memory_analysis().temp_size_in_bytes
    assert memory < length * length / 2  # a byte per pair of one head would be twice that
    assert memory < 40 * 2 * length * width * 2  # some copies of q


@pytest.mark.parametrize(
    "chip, widths",
    [("v5e", (128, 128)), ("v5p", (128, 128)), ("v6e", (256, 256)), ("tpu7x", (192, 128))],
    ids=str,
)
def test_a_row_of_128k_is_one_kernel_each_way(chip, widths):
    length, heads = 128 * 1024, 16
    program = compiled(chip, 1, heads, 8, length, length, *widths, Mask(causal=True))
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", program.as_text())) == 2
    assert program.memory_analysis().temp_size_in_bytes < 8 * 4 * heads * length * widths[0]  # some copies in float32


@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_a_bound_on_the_logits(chip):
    """Traced, it makes two kernels, of which one runs; known, one."""
    shape = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16)

    def forward(q, k, v, max_logit=40.0):
        return attention(q, k, v, Mask(causal=True), backend="tpu", max_logit=max_logit)

    for arguments, kernels in ([shape] * 3, 1), ([shape] * 3 + [jax.ShapeDtypeStruct((), jnp.float32)], 2):
        text = compiled_for(chip, forward, *arguments).as_text()
        assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", text)) == kernels
