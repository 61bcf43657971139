"""A whole training step, compiled for four TPUs that are not here: it stands on our kernels, on a mesh too."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from tpu_chips import devices
from uncached import uncached

from vishwamai import experiment, families
from vishwamai.data.batch import text_batch
from vishwamai.parallel.mesh import AXES
from vishwamai.training.step import make_trainer

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).resolve().parents[3] / "benchmarks" / "qwen3_moe.yaml"


def program(sizes, *overrides):
    """The text of a training step's program."""
    found = devices("v5e")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = Mesh(np.array(found).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    always = "training.dtype=bfloat16", "model.num_hidden_layers=1", "model.head_dim=128"
    run = experiment.load(CONFIG, [*always, *overrides])
    trainer = make_trainer(run, families.get(run.family).build, mesh)
    batch = text_batch(np.zeros((run.training.batch_size, run.data.max_length), np.int32))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), batch)
    with uncached(), jax.set_mesh(mesh):
        return trainer.step.__wrapped__.lower(trainer.abstract, batch).compile().as_text()


@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(data=2, tensor=2)], ids=str)
def test_a_mixture_trains_by_our_kernels(sizes):
    text = program(sizes)
    for kernel in ("attention_forward", "attention_backward", "grouped_matmul", "grouped_matmul_outer"):
        assert kernel in text
    if "fsdp" in sizes:  # of the experts' gradients; XLA's own are called otherwise
        assert len(re.findall(r"reduce-scatter(-start)?\(", text)) >= 3


def test_a_bounded_softmax_is_a_kernel_of_its_own():
    """Beside the one that runs while the bound is too high."""
    text = program(dict(fsdp=4), "family=qwen3", "model.mixture=null", "training.attention_softmax=bounded")
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    for name, count in ("attention_forward", 2), ("attention_backward", 1):
        assert sum(name in line for line in kernels) == count, name
