"""Cached decoding behind images: against the whole forward pass for every token, and Transformers' `generate`."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from parity import llava_config, randomised, saved, text_config, torch, transformers, wakeful

from parsit_jax import Parsit
from parsit_jax.models.config import ImageMask, Pooling
from parsit_jax.models.parsit import ParsitModel
from parsit_jax.pretrained import with_images
from vishwamai.data.batch import text_batch
from vishwamai.generation import generate

IMAGE, FEATURES, LENGTH = 198, 25, 61


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    text = text_config(tie_word_embeddings=False)
    theirs = wakeful(
        randomised(transformers.LlavaForConditionalGeneration(llava_config(text, vision_feature_layer=-2)), 4)
    )
    return theirs, Parsit.from_pretrained(saved(theirs, tmp_path_factory.mktemp("llava")))


def inputs(features=FEATURES):
    """Three prompts that end together: two images; none; one image behind padding."""
    random = np.random.default_rng(0)
    ids, mask = random.integers(1, IMAGE, (3, LENGTH)), np.ones((3, LENGTH), int)
    for row, start in [(0, 2), (0, 30), (2, 25)]:
        ids[row, start : start + features] = IMAGE
    mask[1, :50] = mask[2, :20] = 0
    return ids, mask, random.uniform(-1, 1, (3, 3, 37, 37)).astype(np.float32)


def test_greedy_tokens_equal_transformers(pair):
    theirs, ours = pair
    ids, mask, pixels = inputs()
    given = dict(attention_mask=torch.tensor(mask), pixel_values=torch.tensor(pixels))
    end = dict(eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(torch.tensor(ids), **given, **end, max_new_tokens=20, do_sample=False)[
        :, LENGTH:
    ].numpy()
    batch = with_images(text_batch(ids, mask), pixels, ours.config)
    room = dict(max_new_tokens=20, end_ids=[], pad_id=0)
    got = generate(ours.graph, ours.parameters, batch, **room)
    np.testing.assert_array_equal(got, expected)
    assert min(len(set(row)) for row in got.tolist()) > 5
    swapped = with_images(text_batch(ids, mask), pixels[[1, 0, 2]], ours.config)
    changed = generate(ours.graph, ours.parameters, swapped, **room) != got
    assert changed[0].any() and not changed[1:].any()  # the images are seen, each by its own row


@pytest.mark.parametrize("image_mask", list(ImageMask))
def test_greedy_tokens_equal_those_without_a_cache(pair, image_mask):
    """With `prefix`, an image sees all of itself; 2x2 pooling makes 4 tokens of its 4 x 4 patches."""
    _, ours = pair
    config = ours.config.model_copy(update={"image_mask": image_mask, "pooling": Pooling.AVERAGE_2X2})
    graph = nnx.graphdef(nnx.eval_shape(lambda: ParsitModel(config, rngs=nnx.Rngs(0))))
    ids, mask, pixels = inputs(features=4)
    small = dict(config=config, any_size=True)
    batch = with_images(text_batch(ids, mask), pixels[:, :, :28, :28], **small)
    got = generate(graph, ours.parameters, batch, max_new_tokens=12, end_ids=[], pad_id=0)

    @jax.jit
    def best(parameters, batch, at):
        model = nnx.merge(graph, parameters)
        return model.unembed(model.hidden_states(batch)[:, at]).argmax(axis=-1)

    for step in range(12):
        # Room for all tokens behind the prompt, filled up to here: one shape, compiled once.
        later = np.zeros((3, 12), int)
        later[:, :step] = got[:, :step]
        there = np.broadcast_to(np.arange(12) < step, later.shape)
        whole = text_batch(np.hstack([ids, later]), np.hstack([mask, there]))
        whole = with_images(whole, pixels[:, :, :28, :28], **small)
        np.testing.assert_array_equal(best(ours.parameters, whole, LENGTH + step - 1), got[:, step])

    other = dataclasses.replace(batch, patches=batch.patches[::-1])
    assert (generate(graph, ours.parameters, other, max_new_tokens=12, end_ids=[], pad_id=0) != got).any()


def test_the_two_masks_differ(pair):
    _, ours = pair
    ids, mask, pixels = inputs()
    batch = with_images(text_batch(ids, mask), pixels, ours.config)
    tokens = []
    for image_mask in ImageMask:
        config = ours.config.model_copy(update={"image_mask": image_mask})
        graph = nnx.graphdef(nnx.eval_shape(lambda config=config: ParsitModel(config, rngs=nnx.Rngs(0))))
        tokens.append(generate(graph, ours.parameters, batch, max_new_tokens=20, end_ids=[], pad_id=0))
    differs = (tokens[0] != tokens[1]).any(axis=1)
    assert differs[0] and not differs[1]  # the second prompt has no image
