"""Parsit against Transformers' LlavaForConditionalGeneration with SigLIP and Qwen3 inside."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from parity import (
    assert_close,
    assert_gradients,
    llava_config,
    randomised,
    saved,
    text_config,
    torch,
    transformers,
)

from parsit_jax import Parsit
from parsit_jax.pretrained import with_images
from vishwamai.data.batch import text_batch
from vishwamai.models.layers import Carried
from vishwamai.training.losses import next_token_loss

IMAGE, FEATURES = 198, 25


@pytest.fixture(scope="module", params=[-1, -2], ids=["layer -1", "layer -2"])
def pair(request, tmp_path_factory):
    text = text_config(tie_word_embeddings=request.param == -1)
    config = llava_config(text, vision_feature_layer=request.param)
    theirs = randomised(transformers.LlavaForConditionalGeneration(config))
    return theirs, Parsit.from_pretrained(saved(theirs, tmp_path_factory.mktemp("llava")))


def inputs(seed=0):
    """Three rows with two images, none (and left padding), and one image."""
    random = np.random.default_rng(seed)
    ids, mask = random.integers(0, IMAGE, (3, 70)), np.ones((3, 70), int)
    ids[0, 2:27] = ids[0, 30:55] = ids[2, 40:65] = IMAGE
    mask[1, :9] = 0
    return ids, random.uniform(-1, 1, (3, 3, 37, 37)).astype(np.float32), mask


def test_logits_with_images(pair):
    theirs, ours = pair
    ids, pixels, mask = inputs()
    logits = theirs(torch.tensor(ids), torch.tensor(pixels), torch.tensor(mask)).logits
    got = np.asarray(ours(ids, pixels, mask))
    assert np.isfinite(got).all()
    assert_close(got[mask == 1], logits[torch.tensor(mask) == 1])
    swapped = np.asarray(ours(ids, pixels[::-1], mask))
    assert np.abs(swapped - got)[0, 30:].max() > 1e-2  # the images do matter


def test_logits_of_text_alone(pair):
    theirs, ours = pair
    ids = np.random.default_rng(1).integers(0, IMAGE, (2, 12))
    assert_close(ours(ids), theirs(torch.tensor(ids)).logits)


def test_loss_and_gradients(pair):
    theirs, ours = pair
    ids, pixels, mask = inputs(2)
    labels = torch.tensor(np.where((ids == IMAGE) | (mask == 0), -100, ids))
    # The first token after the padding has nothing before it that could predict it.
    labels[1, 9] = -100
    theirs.zero_grad()
    loss = theirs(torch.tensor(ids), torch.tensor(pixels), torch.tensor(mask), labels=labels).loss
    loss.backward()
    weights = (labels.numpy() != -100).astype(np.float32)
    batch = dataclasses.replace(with_images(text_batch(ids, mask), pixels, ours.config), loss_weights=weights)
    trained, carried = nnx.split_state(ours.parameters, nnx.Param, ...)

    def mean_loss(trained):
        model = nnx.merge(ours.graph, trained, carried)
        return next_token_loss(model, model.hidden_states(batch), batch, chunk=32)[0] / weights[:, 1:].sum()

    value, gradients = jax.value_and_grad(mean_loss)(trained)
    assert abs(float(value) - loss.item()) <= 1e-5
    layout = ours.family.layout
    assert_gradients(gradients, theirs, layout.rows(ours.config), layout.naming("nested").spell)


def test_what_llava_does_not_run_is_carried_and_not_trained(pair):
    _, ours = pair
    kinds = {".".join(path): type(variable) for path, variable in nnx.to_flat_state(ours.parameters)}
    carried = {path for path, kind in kinds.items() if kind is Carried}
    behind = "vision_tower.unused_layers." if ours.config.vision_feature_layer == -2 else "vision_tower.post_layernorm."
    assert any(path.startswith(behind) for path in carried)
    for path in kinds:
        unused = path.startswith(("vision_tower.unused_layers", "vision_tower.post_layernorm", "vision_tower.head"))
        assert (path in carried) == unused, path


def test_images_of_another_size(pair):
    theirs, ours = pair
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 28, 50)).astype(np.float32)
    ids = np.full((1, 33), 3)
    ids[0, 1:29] = IMAGE
    with pytest.raises(
        ValueError, match=r"28 x 50 pixels \(4 x 7 patches\).*stand for 5 x 5.*interpolate_pos_encoding"
    ):
        ours(ids, pixels)
    tower = theirs.model.vision_tower
    states = tower(torch.tensor(pixels), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    features = theirs.model.multi_modal_projector(states[ours.config.vision_feature_layer])
    embedded = theirs.get_input_embeddings()(torch.tensor(ids))
    embedded = embedded.masked_scatter(torch.tensor(ids == IMAGE)[..., None], features)
    assert_close(ours(ids, pixels, interpolate_pos_encoding=True), theirs(inputs_embeds=embedded).logits)


def test_images_and_tokens_that_do_not_fit(pair):
    _, ours = pair
    ids, pixels, _ = inputs()
    for wrong_ids, wrong_pixels, message in [
        (ids, None, r"75 image tokens, but there are no pixel_values"),
        (ids, pixels[:2], r"\[50, 0, 25\] image tokens; 2 images of 25 features each need 50"),
        (np.where(np.arange(70) == 5, 3, ids), pixels, r"\[49, 0, 25\] image tokens; 3 images"),
        (
            ids,
            pixels[:, :2],
            r"normalised floats of shape \(images, 3, height, width\), found float32 \(3, 2, 37, 37\)",
        ),
        (ids, np.zeros((3, 3, 37, 37), np.uint8), r"normalised floats.*found uint8"),
        (ids, pixels[..., :6], r"37 x 6 pixels hold no patch of 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours(wrong_ids, wrong_pixels)


def test_more_feature_layers_from_the_front(tmp_path):
    """Hidden state 2 of 3 layers is -2: Llava counts from either end."""
    config = llava_config(vision_feature_layer=2)
    theirs = randomised(transformers.LlavaForConditionalGeneration(config), seed=5)
    ours = Parsit.from_pretrained(saved(theirs, tmp_path))
    assert ours.config.vision_feature_layer == -2
    ids, pixels, _ = inputs()
    assert_close(ours(ids, pixels), theirs(torch.tensor(ids), torch.tensor(pixels)).logits)
