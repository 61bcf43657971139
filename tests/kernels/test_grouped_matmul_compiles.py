"""The TPU kernels, compiled for real chips that are not here: nothing overflows, and nothing is dense."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kernels import grouped_matmul
from kernels.grouped_matmul.quantized import Quantized

pytestmark = pytest.mark.slow
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# rows, D, F, E
SHAPES = {"Qwen3-30B-A3B": (65536, 2048, 768, 128), "odd": (1000, 100, 77, 5), "decode": (64, 2048, 768, 128)}


def compiled(chip: str, run, *shapes):
    """The program for one device of that chip."""
    pytest.importorskip("libtpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract)):
        return jax.jit(run).lower(*shapes).compile()


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

    program = compiled(chip, run, *arrays(SHAPES[shape], jnp.bfloat16))
    assert program.as_text().count("tpu_custom_call") >= 3, "y, dx and dw"
    assert program.memory_analysis().temp_size_in_bytes < 2**26, "nothing is copied"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chip", CHIPS)
def test_matrices_transposed_and_quantized(chip, dtype):
    x, w, sizes, dy = arrays((4096, 512, 256, 16), dtype)

    def run(x, w, values, scales, sizes, dy):
        y, back = jax.vjp(lambda dy: grouped_matmul(dy, w, sizes, transpose_w=True), dy)
        small, small_back = jax.vjp(lambda x: grouped_matmul(x, Quantized(values, scales), sizes), x)
        turned = Quantized(values.swapaxes(1, 2), scales)
        again, again_back = jax.vjp(lambda x: grouped_matmul(x, turned, sizes, transpose_w=True), x)
        return y, *back(x), small, *small_back(dy), again, *again_back(dy)

    scales = jax.ShapeDtypeStruct((16, 256), jnp.float32)
    values = jax.ShapeDtypeStruct(w.shape, jnp.int8 if dtype == jnp.float32 else jnp.float8_e4m3fn)
    assert compiled(chip, run, x, w, values, scales, sizes, dy).as_text().count("tpu_custom_call") >= 6
