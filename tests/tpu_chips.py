"""Programs for TPUs that are not here, compiled by the TPU's own compiler (libtpu)."""

import os
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec
from uncached import uncached

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(chip: str) -> list:
    """Devices of a small slice. Skips the test without libtpu."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices


def compiled_for(chip: str, f: Callable, *shapes):
    """`f` of arrays like `shapes` (anything with shape and dtype), compiled for one device of that chip."""
    device = devices(chip)[0]
    place = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    with uncached(), jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind)):
        return jax.jit(f).lower(*shapes).compile()
