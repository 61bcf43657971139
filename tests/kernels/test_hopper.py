"""Which GPUs are taken for Hopper, here or not."""

from types import SimpleNamespace

import jax
import pytest
from hopper import compiling_for

from kernels import hopper


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GH200 480GB"])
def test_by_name_where_it_is_not_here(kind):
    with compiling_for(kind):
        assert hopper.refusal() is None
        assert hopper.multiprocessors() == 132
    with compiling_for(kind, cores=114):
        assert hopper.multiprocessors() == 114


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA GB200", "NVIDIA GeForce RTX 4090", "AMD Instinct"])
def test_no_other(kind):
    with compiling_for(kind):
        assert hopper.refusal() == f"it is for Hopper GPUs, not for {kind!r}"


@pytest.mark.parametrize(("capability", "is_one"), [("9.0", True), ("8.0", False), ("10.0", False), ("gfx942", False)])
def test_by_its_capability_where_it_is_here(monkeypatch, capability, is_one):
    device = SimpleNamespace(compute_capability=capability, core_count=114, device_kind="any")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert (hopper.refusal() is None) == is_one
    assert hopper.multiprocessors() == 114


def test_a_cpu_is_none():
    assert "Hopper" in hopper.refusal()
