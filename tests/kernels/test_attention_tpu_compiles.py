"""The TPU's attention kernels, compiled by its own compiler for chips that are not here."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask
from kernels.attention import tpu

pytestmark = pytest.mark.slow

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compiled(chip: str, batch, heads, kv_heads, queries, keys, width, v_width, mask: Mask, dtype="bfloat16", **options):
    """Forward and backward of one call; the mask's arrays are only shapes."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ.update(ENVIRONMENT)
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    place = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array([device]), "x"), jax.sharding.PartitionSpec())
    kind = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    qkv = (
        array(batch, queries, heads, width),
        array(batch, keys, kv_heads, width),
        array(batch, keys, kv_heads, v_width),
    )
    sinks = array(heads, dtype=jnp.float32) if options.pop("sinks", False) else None
    mask = jax.tree.map(lambda x: array(*x.shape, dtype=jnp.int32), mask)
    assert tpu.refusal(*qkv, mask, 0.1, None, sinks) is None

    def both(q, k, v, mask, sinks):
        out, lse = tpu.attention(q, k, v, mask, 0.1, options.get("softcap"), sinks)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=kind)):
        gradient = jax.jit(jax.grad(both, (0, 1, 2) if sinks is None else (0, 1, 2, 4)))
        return gradient.lower(*qkv, mask, sinks).compile()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "widths", [(64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str
)
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


@pytest.mark.parametrize("chip", ["v5p", "tpu7x"])  # those with the least fast memory
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("length", [32 * 1024, 128 * 1024])
@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_need_no_square_buffer(chip, width, length, packed):
    mask = Mask(causal=True, q_segment_ids=np.zeros((1, length), int) if packed else None)
    memory = compiled(chip, 1, 4, 2, length, length, width, width, mask).memory_analysis().temp_size_in_bytes
    assert memory < length * length / 2  # a byte per pair of one head would be twice that
    assert memory < 40 * 4 * length * width * 2  # some copies of q
