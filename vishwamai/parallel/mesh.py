"""The device mesh: `data`, `fsdp`, `tensor`; one device is all axes 1."""

import math
import os
import re
from collections.abc import Iterable
from typing import Self

import jax
from jax.sharding import AxisType, Mesh
from pydantic import Field, model_validator

from vishwamai.config import Config, ConfigError

AXES = ("data", "fsdp", "tensor")


class MeshConfig(Config):
    """How many devices each axis spans; one axis may be -1 and takes what is left."""

    data: int = Field(1, ge=-1, description="replicas: each holds all parameters and a share of the rows")
    fsdp: int = Field(1, ge=-1, description="parameters, optimizer state and rows are split over these")
    tensor: int = Field(1, ge=-1, description="heads, feed-forward and vocabulary are split over these")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 0 in self.sizes or self.sizes.count(-1) > 1:
            raise ValueError(f"{_spelled(self.sizes)}: sizes are at least 1, and at most one is -1")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)


def devices_needed(config: MeshConfig) -> int:
    """Product of the fixed axes (an axis of -1 counts as 1)."""
    return math.prod(abs(size) for size in config.sizes)


def resolve(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes with -1 filled in. Raises ConfigError when they don't fit the devices that are there."""
    sizes, fixed = list(config.sizes), devices_needed(config)
    if -1 in sizes:
        if devices % fixed:
            raise ConfigError(f"mesh {_spelled(sizes)} needs a multiple of {fixed} devices, found {devices}")
        sizes[sizes.index(-1)] = devices // fixed
    if math.prod(sizes) > devices:
        raise ConfigError(
            f"mesh {_spelled(sizes)} needs {math.prod(sizes)} devices, found {devices}: lower an axis, or set one to -1"
        )
    return tuple(sizes)


def _spelled(sizes: Iterable[int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def make_mesh(config: MeshConfig | None = None, devices: list | None = None) -> Mesh:
    """A mesh over the first devices; Auto axis types, so that XLA propagates shardings."""
    config = config or MeshConfig()
    devices = devices or jax.devices()
    sizes = resolve(config, len(devices))
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices[: math.prod(sizes)])


def simulate_cpu_devices(config: MeshConfig) -> None:
    """On CPU, makes at least as many simulated devices as the mesh needs. Must run before JAX is first used.

    Where there is an accelerator this changes nothing: its devices are taken, and CPU devices cost nothing.
    """
    # The option outdoes XLA's flag for the same thing: what that asks for must not shrink.
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = max(devices_needed(config), jax.config.jax_num_cpu_devices, int(flag[1]) if flag else 1)
    jax.config.update("jax_num_cpu_devices", devices)
