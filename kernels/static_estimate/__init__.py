"""How long a Pallas kernel takes on a TPU that is not here: compiled for it, its final bundles counted.

    with chip_process("v6e") as process:
        program = process.submit(compile_program, function, structs).result()
    milliseconds = estimate(program.kernels[0], Geometry(bodies=(6, 4), rows=4), "v6e").milliseconds

`kernels.tune` chooses block sizes by it, `benchmarks/tpu_static` compares kernels. Needs libtpu.
"""

from kernels.static_estimate.chips import CHIPS
from kernels.static_estimate.compiler import CompileError, Kernel, Program, chip_process, compile_program, target
from kernels.static_estimate.estimate import Estimate, Geometry, estimate

__all__ = [
    "CHIPS", "CompileError", "Estimate", "Geometry", "Kernel", "Program", "chip_process", "compile_program", "estimate",
    "target",
]  # fmt: skip
