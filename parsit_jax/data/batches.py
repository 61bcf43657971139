"""The `data:` section of a Parsit experiment -> the batch of every step."""

from collections.abc import Sequence
from functools import partial

from parsit_jax.data import conversations
from parsit_jax.data.config import DatasetConfig, PageFiles, ParsitData
from parsit_jax.data.examples import Encoder
from parsit_jax.data.generated import GeneratedRows
from parsit_jax.models.config import ParsitConfig
from vishwamai.chat import IMAGE_TOKEN
from vishwamai.config import ConfigError
from vishwamai.data.conversations import check_vocabulary
from vishwamai.data.lengths import length_index
from vishwamai.data.mixture import MixedBatches, RowStream
from vishwamai.data.packing import Capacity
from vishwamai.data.pool import PackedPool
from vishwamai.data.sources import Records
from vishwamai.experiment import Experiment
from vishwamai.tokenizer import VishwamAITokenizer


def capacity(data: ParsitData, encoder: Encoder) -> Capacity:
    """What a row holds. Raises ConfigError when a whole image is needed and has no room, or pooling no whole images."""
    one = encoder.layout.patches
    patches = one if data.max_patches is None else data.max_patches
    if patches < one and not all(dataset.skip_blank_patches for dataset in data.datasets):
        raise ConfigError(f"data.max_patches={patches} holds no image, which has {one} patches")
    if patches % one and encoder.layout.patches_per_feature > 1:
        raise ConfigError(
            f"data.max_patches={patches} is no multiple of an image's {one} patches: 2x2 pooling needs one"
        )
    return Capacity(data.max_length, patches, encoder.layout)


def batch_source(experiment: Experiment, tokenizer: VishwamAITokenizer) -> MixedBatches:
    """Global batches of packed conversations with their images, by step number.

    Raises:
        ConfigError: sizes that don't fit each other, or a tokenizer that isn't the model's.
        DataError: files that are missing, broken, empty or longer than a row.
    """
    data: ParsitData = experiment.data
    check_tokenizer(tokenizer, experiment.model)
    encoder = Encoder.of(experiment.model, tokenizer, data.image_size)
    room = capacity(data, encoder)
    weighted = [[dataset] for dataset in data.datasets]
    if data.datasets[0].weight is None and data.datasets[0].generated is None:
        weighted = [data.datasets]  # files without weights are one pool
    streams = tuple(
        stream(members, data, room, encoder, (experiment.seed, number)) for number, members in enumerate(weighted)
    )
    weights = tuple(members[0].weight or 1.0 for members in weighted)
    return MixedBatches(streams, weights, room, experiment.training.batch_size)


def check_tokenizer(tokenizer: VishwamAITokenizer, config: ParsitConfig) -> None:
    """Raises ConfigError unless the tokenizer's ids, and its image token, are those of the model."""
    check_vocabulary(tokenizer, config.text)
    added = tokenizer.added_tokens.get(IMAGE_TOKEN)
    if added is None:
        raise ConfigError(f"the tokenizer in {tokenizer.folder} has no {IMAGE_TOKEN}: name the model's own tokenizer")
    image = added.id
    if image != config.image_token_id:
        raise ConfigError(
            f"{IMAGE_TOKEN} is {image} in the tokenizer in {tokenizer.folder}, the model says "
            f"image_token_id={config.image_token_id}: set it to {image}, or name the model's own tokenizer"
        )


def stream(
    datasets: Sequence[DatasetConfig],
    data: ParsitData,
    room: Capacity,
    encoder: Encoder,
    seed: tuple[int, int],
) -> RowStream:
    """The rows of one dataset, or of several of files together."""
    if datasets[0].generated is not None:
        if datasets[0].skip_blank_patches and encoder.layout.patches_per_feature > 1:
            raise ConfigError("skip_blank_patches and 2x2 pooling exclude each other: features pool whole squares")
        return GeneratedRows(datasets[0], encoder, room, seed, data.too_long)
    records = Records(datasets, seed, PageFiles)
    key = [encoder.layout.tokens, encoder.layout.patches]
    lengths = length_index(records, partial(conversations.measure, encoder=encoder), encoder.tokenizer, key)
    load = partial(conversations.load, encoder=encoder)
    return PackedPool(records, lengths, load, room, seed, data.too_long)
