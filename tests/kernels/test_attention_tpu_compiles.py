"""The TPU's attention kernels, compiled by its own compiler for chips that are not here: a small set of all there is.

More shapes, and how long they take: `python -m benchmarks.tpu_static`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_chips import CHIPS, compiled_for

from kernels import Mask
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
