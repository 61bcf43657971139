"""Checkpoints: one array per layer on disk, committed whole or not at all, restored onto any mesh.

Orbax's `CheckpointManager` (the v0 API, which v1's `Checkpointer` itself stands on in 0.12) with `StandardSave` items:
`parameters` and `optimizer`, each a flat {name: array}, and `about` (JSON: format version, step, data position).
"""

from vishwamai.checkpoint.arrays import (
    CheckpointError,
    latest_step,
    load_parameters,
    save_parameters,
    steps,
)
from vishwamai.checkpoint.store import Checkpoints
from vishwamai.checkpoint.streaming import Deferred, save_deferred, stored_arrays

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Deferred",
    "latest_step",
    "load_parameters",
    "save_deferred",
    "save_parameters",
    "steps",
    "stored_arrays",
]
