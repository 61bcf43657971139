"""What the estimate knows of a TPU: published peaks, per TensorCore, and the matrix unit's pace."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One TensorCore of a TPU generation.

    topology: the smallest slice that libtpu describes, `accelerator` the name by which libtpu knows the host.
    clock: Hz, worked out from the published bf16 peak and the size of the matrix units; tpu7x's is inferred.
    matmul_cycles: a matrix unit's cycles for one bf16 `vmatmul`; a float32 one holds half the rows.
    bandwidth: HBM bytes per second.
    """

    topology: str
    accelerator: str
    clock: float
    matrix_units: int
    matmul_cycles: int
    bandwidth: float

    def matmul_floor(self, matmuls: dict[str, int]) -> float:
        """Cycles that the matrix units need at least for so many `vmatmul` of each type.

        The compiler's schedule issues them faster than the units drain them, so a body's bundles alone are too few.
        """
        cycles = sum(count * self.matmul_cycles / (2 if kind == "f32" else 1) for kind, count in matmuls.items())
        return cycles / self.matrix_units


CHIPS = {
    "v5e": Chip("v5e:2x2", "v5litepod-4", 1.5e9, 4, 16, 0.82e12),
    "v5p": Chip("v5p:2x2x1", "v5p-8", 1.75e9, 4, 16, 1.38e12),
    "v6e": Chip("v6e:2x2", "v6e-4", 1.75e9, 2, 8, 1.64e12),
    "tpu7x": Chip("tpu7x:2x2x1", "tpu7x-8", 2.2e9, 2, 8, 3.69e12),
}
