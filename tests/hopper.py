"""Programs for an NVIDIA H100 that is not here, compiled by XLA and ptxas for it: Pallas' Mosaic kernels too.

ptxas lies beside the plugin. With `MOSAIC_GPU_DUMP_PTXAS=1` in the environment it prints each kernel's registers and
spills.
"""

from collections.abc import Callable

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec
from uncached import uncached

# What XLA asks of a device before it compiles for it; figures of NVIDIA's data sheet and of the CUDA programming guide.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compiling_for(kind: str = "any", shape=(1,), names=("x",), cores: int | None = None):
    """A context in which JAX traces for a mesh of GPUs that are not here; cores: multiprocessors, if that is known."""
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="cuda")
    axes = (AxisType.Auto,) * len(shape)
    return jax.sharding.use_abstract_mesh(AbstractMesh(shape, names, axes, abstract_device=device))


def compiled_for_h100(f: Callable, *shapes):
    """`f` of arrays like `shapes` (anything with shape and dtype), compiled for one. Skips without the CUDA plugin."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    place = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with uncached(), compiling_for(topology.devices[0].device_kind):
        return jax.jit(f).lower(*shapes).compile()
