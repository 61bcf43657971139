"""Compiles for a TPU that is not here, in a process of its own, and keeps what the compiler says of each kernel.

libtpu reads its options once, when it is loaded, and serves one topology well: so each chip gets a fresh process.

    with chip_process("v5e") as process:
        program = process.submit(compile_program, function, structs).result()
"""

import functools
import glob
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kernels.static_estimate.bundles import Part, parse
from kernels.static_estimate.chips import CHIPS

CUSTOM_CALL = re.compile(r"%([\w.-]+) = [^\n]*? custom-call\([^\n]*custom_call_target=\"tpu_custom_call\"([^\n]*)")
ATTRIBUTES = re.compile(r"frontend_attributes=\{([^\n}]*)\}")
_dump: tempfile.TemporaryDirectory | None = None
_chip: str | None = None


class Kernel(NamedTuple):
    """A Pallas kernel as it was compiled.

    grid: with None for a dynamic side; None in all for a kernel that XLA put in (`jax.lax.ragged_dot`).
    blocks: shape of each operand's block, inputs first; an operand that is not blocked has its own shape.
    attributes: what its author wrote to XLA about it.
    """

    name: str
    grid: tuple[int | None, ...] | None
    bundles: Part
    blocks: tuple[tuple[int, ...], ...] = ()
    attributes: dict[str, str] = {}


class Program(NamedTuple):
    """kernels in the order in which they run; sizes in bytes; `seconds` is what compiling took."""

    kernels: tuple[Kernel, ...]
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    seconds: float


class CompileError(RuntimeError):
    """The compiler's own words (its exceptions do not always travel between processes)."""


def chip_process(chip: str) -> ProcessPoolExecutor:
    """A fresh process in which `compile_program` compiles for `chip`; what is submitted must be importable there.

    Raises ValueError: a chip that `CHIPS` does not know.
    """
    if chip not in CHIPS:
        raise ValueError(f"found chip {chip!r}, expected one of {', '.join(CHIPS)}")
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (chip,))


def _prepare(chip: str) -> None:
    global _dump, _chip
    _chip, _dump = chip, tempfile.TemporaryDirectory(prefix=f"bundles_{chip}_")
    dump = f"--xla_jf_dump_to={_dump.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
    os.environ |= {
        "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several such processes, each without a TPU
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": CHIPS[chip].accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


@functools.cache
def _device():
    from jax.experimental import topologies  # here, not above: it is this that loads libtpu

    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[_chip].topology).devices[0]


def compile_program(function: Callable, structs: Sequence[Any]) -> Program:
    """Compiles `function` for the process's chip, for arrays of those shapes and types on one device.

    Raises:
        RuntimeError: this process was not made by `chip_process`.
        CompileError: the compiler refused (too much VMEM, most often).
    """
    if _dump is None:
        raise RuntimeError("compile_program runs in the process that chip_process(...) gives: submit it there")
    for path in glob.glob(f"{glob.escape(_dump.name)}/*"):
        os.remove(path)
    sharding = NamedSharding(Mesh(np.array([_device()]), ("x",)), PartitionSpec())
    structs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), structs)
    start = time.perf_counter()
    with target():
        traced = jax.jit(function).trace(*structs)
        try:
            compiled = traced.lower().compile()
        except Exception as error:
            raise CompileError(f"{type(error).__name__}: {error}") from None
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    calls = list(_pallas_calls(traced.jaxpr.jaxpr))
    return Program(
        tuple(_kernel(name, rest, calls) for name, rest in CUSTOM_CALL.findall(compiled.as_text())),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        seconds,
    )


def target():
    """A context in which Pallas, and what asks it, finds the process's chip."""
    device = _device()
    cores = getattr(device, "num_cores", 1)
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract))


def _pallas_calls(jaxpr) -> Iterator[dict[str, Any]]:
    """Of those calls whose results are read: XLA leaves the others out (a forward whose gradient alone is wanted)."""
    read, live = set(map(id, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or read & set(map(id, equation.outvars)):
            read |= set(map(id, equation.invars))
            live.append(equation)
    for equation in reversed(live):
        if equation.primitive.name == "pallas_call":
            yield equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from _pallas_calls(inner)


def _kernel(name: str, hlo: str, calls: list[dict[str, Any]]) -> Kernel:
    """The HLO instruction `name` holds its call's name (`jvp_NAME_.1`), if its author gave one; of equal ones the first
    not taken is meant."""
    written = re.compile(rf"\d+-{re.escape(name)}-\d+-final_bundles\.txt")
    paths = [path for path in Path(_dump.name).iterdir() if written.fullmatch(path.name)]
    if len(paths) != 1:
        raise CompileError(f"libtpu wrote {len(paths)} files of final bundles for the kernel {name}, expected 1")
    with paths[0].open(errors="replace") as lines:
        bundles = parse(lines)
    attributes = ATTRIBUTES.search(hlo)
    attributes = dict(re.findall(r'(\w+)="([^"]*)"', attributes.group(1))) if attributes else {}
    named = [call for call in calls if call["name"] and call["name"] in name]
    named = named or [call for call in calls if not call["name"]]
    if not named:
        return Kernel(name, None, bundles, (), attributes)
    call = max(named, key=lambda call: len(call["name"] or ""))  # the first of the longest
    calls.remove(call)
    mapping = call["grid_mapping"]
    grid = tuple(side if isinstance(side, int) else None for side in mapping.grid)
    blocks = tuple(_sizes(block.block_shape) for block in mapping.block_mappings)
    return Kernel(call["name"] or name, grid, bundles, blocks, attributes)


def _sizes(block_shape) -> tuple[int, ...]:
    """Pallas says in several ways that a side is one element and left out."""
    return tuple(getattr(side, "block_size", 1) if not isinstance(side, int) else side for side in block_shape)
