"""Meshes: sizes that fit, the axis that takes what is left, simulated devices, and where parameters lie."""

import logging
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from vishwamai.config import ConfigError, validate
from vishwamai.parallel import sharding
from vishwamai.parallel.mesh import AXES, MeshConfig, make_mesh, resolve


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        ({}, 8, (1, 1, 1)),
        ({"data": 2, "tensor": 2}, 8, (2, 1, 2)),
        ({"fsdp": -1}, 8, (1, 8, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2)),
        ({"data": -1, "fsdp": 8}, 8, (1, 8, 1)),
    ],
)
def test_sizes(config, devices, sizes):
    assert resolve(MeshConfig(**config), devices) == sizes


def test_a_mesh_that_does_not_fit_is_told():
    with pytest.raises(ConfigError, match="data=4, fsdp=1, tensor=4 needs 16 devices, found 8"):
        resolve(MeshConfig(data=4, tensor=4), 8)
    with pytest.raises(ConfigError, match="data=-1, fsdp=3, tensor=1 needs a multiple of 3 devices, found 8"):
        resolve(MeshConfig(data=-1, fsdp=3), 8)


@pytest.mark.parametrize("tree", [{"data": 0}, {"data": -1, "tensor": -1}, {"fsdp": -2}])
def test_what_is_no_mesh_is_refused_before_any_device_is_touched(tree):
    with pytest.raises(ConfigError, match="at least 1, and at most one is -1|greater than or equal to -1"):
        validate(MeshConfig, tree, "test")


def test_a_mesh_takes_the_first_devices():
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[:4]


@pytest.mark.parametrize(("flag", "sizes"), [(None, (2, 1, 3)), (12, (2, 2, 3))])
def test_cpu_devices_are_simulated_and_never_fewer_than_asked_for(flag, sizes):
    code = """
from vishwamai.parallel.mesh import MeshConfig, make_mesh, simulate_cpu_devices
config = MeshConfig(data=2, fsdp=-1, tensor=3)
simulate_cpu_devices(config)
print(tuple(make_mesh(config).shape.values()))
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={flag}" if flag else ""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str(sizes), done.stderr


def test_a_dimension_that_cannot_be_split_is_whole_and_told_once(caplog):
    mesh = AbstractMesh((1, 4, 2), AXES, (AxisType.Auto,) * 3)
    sharding._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert sharding.spec(("embed", "mlp"), (3, 8, 6), mesh) == PartitionSpec(None, "fsdp", "tensor")
            assert sharding.spec(("embed", "mlp"), (6, 6), mesh) == PartitionSpec(None, "tensor")
    assert [record.getMessage() for record in caplog.records] == [
        "a dimension 'embed' of size 6 is not split: 4 devices do not divide it"
    ]
