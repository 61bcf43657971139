"""Our vision tower against Transformers' SiglipVisionModel."""

import jax
import numpy as np
import pytest
from flax import nnx
from parity import assert_close, assert_gradients, randomised, saved, torch, transformers, vision_config

from parsit_jax.models.config import VisionConfig
from parsit_jax.models.siglip import SiglipVision
from parsit_jax.pretrained import to_patches
from vishwamai.convert.source import open_source


class Tower:
    """A tower of ours with the weights in a folder, called on images as theirs is."""

    def __init__(self, folder, feature_layers=None):
        source = open_source(folder)
        self.config: VisionConfig = source.config
        self.rows = source.family.layout.rows(self.config)
        self.module = SiglipVision(self.config, feature_layers, rngs=nnx.Rngs(0))
        if feature_layers is None:
            nnx.update(self.module, source.parameters("float32"))
        self.graph, self.parameters = nnx.split(self.module)

    def inputs(self, images):
        """Each image a row of its own, preceded by an empty image's place: padding must change nothing."""
        patches, grid = to_patches(images, self.config)
        count, cells, _ = patches.shape
        patches = np.concatenate([np.full_like(patches, 7.0), patches], axis=1)
        ids = np.repeat([[0, 1]] * count, cells, axis=1).astype(np.int32)
        cell = np.stack(np.divmod(np.arange(cells), grid[1]), axis=-1)
        return patches, np.tile(cell, (count, 2, 1)).astype(np.int32), ids, grid, cells

    def __call__(self, images):
        *inputs, grid, cells = self.inputs(images)
        return self.module(*inputs, grid)[:, cells:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(randomised(transformers.SiglipVisionModel(vision_config())), tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.SiglipVisionModel.from_pretrained(folder).eval()


def images(count, height=37, width=37, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, height, width)).astype(np.float32)


def test_last_hidden_state(folder, theirs):
    pixels = images(3)
    assert_close(Tower(folder)(pixels), theirs(torch.tensor(pixels)).last_hidden_state)


@pytest.mark.parametrize("size", [(14, 63), (70, 70), (36, 90), (7, 7), (37, 42)])
def test_other_resolutions(folder, theirs, size):
    pixels = images(2, *size)
    expected = theirs(torch.tensor(pixels), interpolate_pos_encoding=True).last_hidden_state
    assert_close(Tower(folder)(pixels), expected)


def test_patch_16_without_a_remainder_and_without_a_head(tmp_path):
    config = vision_config(image_size=64, patch_size=16, vision_use_head=False)
    model = randomised(transformers.SiglipVisionModel(config), seed=3)
    pixels = images(2, 64, 64)
    ours = Tower(saved(model, tmp_path))
    assert not hasattr(ours.module, "head")
    assert_close(ours(pixels), model(torch.tensor(pixels)).last_hidden_state)


def test_packed_images_are_computed_as_if_alone(folder):
    tower = Tower(folder)
    first, second = (to_patches(images(1, seed=seed), tower.config)[0] for seed in (1, 2))
    cell = np.stack(np.divmod(np.arange(25), 5), axis=-1)[None].astype(np.int32)
    packed = tower.module(
        np.concatenate([first, second], axis=1),
        np.concatenate([cell, cell], axis=1),
        np.repeat([[1, 2]], 25, axis=1).astype(np.int32),
        (5, 5),
    )
    for alone, part in [(first, packed[:, :25]), (second, packed[:, 25:])]:
        np.testing.assert_allclose(tower.module(alone, cell, np.ones((1, 25), np.int32), (5, 5)), part, atol=1e-5)


def test_gradients(folder, theirs):
    pixels = images(2)
    target = np.random.default_rng(1).normal(size=(2, 25, 40)).astype(np.float32)
    theirs.zero_grad()
    loss = ((theirs(torch.tensor(pixels)).last_hidden_state - torch.tensor(target)) ** 2).mean()
    loss.backward()
    tower = Tower(folder)
    *inputs, grid, cells = tower.inputs(pixels)
    trained, carried = nnx.split_state(tower.parameters, nnx.Param, ...)

    def squared_error(trained):
        features = nnx.merge(tower.graph, trained, carried)(*inputs, grid)[:, cells:]
        return ((features - target) ** 2).mean()

    value, gradients = jax.value_and_grad(squared_error)(trained)
    assert abs(float(value) - loss.item()) < 1e-5
    assert_gradients(gradients, theirs, tower.rows)
