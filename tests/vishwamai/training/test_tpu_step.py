"""A whole training step, compiled for four TPUs that are not here: it stands on our kernels, on a mesh too."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from tpu_chips import devices

from vishwamai import experiment, families
from vishwamai.data.batch import text_batch
from vishwamai.parallel.mesh import AXES
from vishwamai.training.step import make_trainer

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).resolve().parents[3] / "benchmarks" / "qwen3_moe.yaml"


@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(data=2, tensor=2)], ids=str)
def test_a_mixture_trains_by_our_kernels(sizes):
    found = devices("v5e")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = Mesh(np.array(found).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    overrides = ["training.dtype=bfloat16", "model.num_hidden_layers=1", "model.head_dim=128"]
    run = experiment.load(CONFIG, overrides)
    trainer = make_trainer(run, families.get(run.family).build, mesh)
    batch = text_batch(np.zeros((run.training.batch_size, run.data.max_length), np.int32))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), batch)
    with jax.set_mesh(mesh):
        program = trainer.step.__wrapped__.lower(trainer.abstract, batch).compile().as_text()
    for kernel in ("attention_forward", "attention_backward", "grouped_matmul", "grouped_matmul_outer"):
        assert kernel in program
