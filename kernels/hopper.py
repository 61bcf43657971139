"""What is known of the GPU that is compiled for, here or not: kernels of Hopper's own instructions run on no other."""

import re

import jax

# NVIDIA's names for chips of compute capability 9.0.
_NAMES = re.compile(r"\b(H20|H100|H200|H800|GH200)\b")
MULTIPROCESSORS = 132  # of an H100 SXM and of an H200


def refusal() -> str | None:
    """Why a kernel for Hopper can't run on what is compiled for; None where it can."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return None if _NAMES.search(device.device_kind) else f"it is for Hopper GPUs, not for {device.device_kind!r}"
    here = jax.devices()[0]
    capability = getattr(here, "compute_capability", None)
    return (
        None
        if capability == "9.0"
        else f"it is for GPUs of compute capability 9.0 (Hopper), not for {here.device_kind!r}"
    )


def multiprocessors() -> int:
    """Of the GPU that is compiled for; where nobody knows them, as of one that is not here, the largest's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:  # a mesh of GPUs that are here knows theirs
        return device.num_cores or MULTIPROCESSORS
    return getattr(jax.devices()[0], "core_count", MULTIPROCESSORS)
