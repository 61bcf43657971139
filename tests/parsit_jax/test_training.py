"""The train step of a document model: meshes and micro-batches change nothing, what is only carried never moves."""

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from parsit_jax.models.config import ParsitConfig
from parsit_jax.models.parsit import ParsitModel
from vishwamai.config import Config
from vishwamai.data.packing import Capacity, Example, ImageLayout, collate
from vishwamai.experiment import Experiment
from vishwamai.models.layers import Carried
from vishwamai.parallel.mesh import make_mesh
from vishwamai.training.metrics import means
from vishwamai.training.step import make_trainer

IMAGE, FEATURES = 63, 4
ROOM = Capacity(tokens=24, patches=3 * FEATURES, image=ImageLayout(2, 2, patch_features=48))
TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
MODEL = ParsitConfig(
    text=TEXT | {"num_key_value_heads": 2, "head_dim": 8},
    vision=VISION | {"image_size": 8, "patch_size": 4},
    vision_feature_layer=-2,
    image_token_id=IMAGE,
)


def example(draw, images):
    """`images` images, then text that tells how bright the last one is."""
    pixels = [draw.integers(0, 256) * np.ones((FEATURES, 48), np.uint8) for _ in range(images)]
    told = [int(pixels[-1][0, 0]) // 8] if images else []
    tokens = [IMAGE] * (FEATURES * images) + [*draw.integers(32, 62, 3), *told]
    index = np.full(len(tokens), -1, np.int32)
    index[: FEATURES * images] = np.arange(FEATURES * images)
    weights = np.float32(index < 0) * np.float32(draw.choice([0.5, 1.0]))
    return Example(np.int32(tokens), weights, index, tuple(np.uint8(image) for image in pixels))


def batch(step):
    """Rows of no, one, two and three images; packed and not."""
    draw = np.random.default_rng(step)
    rows = [(0,), (1,), (2,), (1, 1), (0, 2), (1, 0, 1), (0, 0), (3,)]
    return collate([[example(draw, images) for images in row] for row in rows], ROOM)


def trainer_for(mesh=None, **training):
    fixed = dict(family="test", run_dir="unused", tokenizer="unused", model=MODEL, data=Config())
    training = {"steps": 5, "batch_size": 8, "loss_chunk": 8} | training
    experiment = Experiment(**fixed, training=training, mesh=mesh or {}, optimizer={"learning_rate": 3e-3})
    return make_trainer(experiment, ParsitModel, make_mesh(experiment.mesh))


def losses(trainer):
    state, found = trainer.initial(), []
    for step in range(5):
        state, metrics = trainer.step(state, batch(step))
        found.append(means(jax.device_get(metrics)))
    assert all(metrics["healthy"] for metrics in found)
    return state, [metrics["loss"] for metrics in found]


@pytest.fixture(scope="module")
def on_one_device():
    return losses(trainer_for())[1]


def test_images_are_learned_from(on_one_device):
    trainer = trainer_for()
    gradients, *_ = trainer.gradients(trainer.initial(), batch(0))
    flat = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(gradients)}
    for name in ("vision_tower.embeddings.patch_embedding.kernel", "multi_modal_projector.linear_1.kernel"):
        assert np.abs(flat[name]).max() > 1e-6, name
    assert on_one_device[-1] < on_one_device[0] - 0.02


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"tensor": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes_give_the_same_losses(on_one_device, mesh):
    assert_allclose(losses(trainer_for(mesh))[1], on_one_device, rtol=0, atol=1e-5)


def test_accumulation_equals_the_big_batch(on_one_device):
    """Micro-batches hold unequal numbers of images and of trained tokens."""
    assert_allclose(losses(trainer_for(gradient_accumulation=4))[1], on_one_device, rtol=0, atol=1e-5)


def test_carried_layers_are_neither_trained_nor_in_the_optimizer():
    trainer = trainer_for()
    before = trainer.initial().frozen
    after, _ = losses(trainer)
    flat = dict(nnx.to_flat_state(after.frozen))
    assert {type(variable) for variable in flat.values()} == {Carried}
    assert any("unused_layers" in path for path in flat)
    jax.tree.map(assert_array_equal, after.frozen, before)
    moments = sum(x.size for x in jax.tree.leaves(trainer.abstract.optimizer))
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(trainer.abstract.trainable)) + 2  # and two counts
