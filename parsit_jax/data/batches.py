"""The `data:` section of a Parsit experiment -> the batch of every step."""

from collections.abc import Sequence
from functools import partial

from parsit_jax.data import conversations
from parsit_jax.data.config import DatasetConfig, PageFiles, ParsitData
from parsit_jax.data.examples import Encoder
from parsit_jax.data.generated import GeneratedRows
from vishwamai.config import ConfigError
from vishwamai.data.lengths import length_index
from vishwamai.data.mixture import MixedBatches, RowStream
from vishwamai.data.packing import Capacity
from vishwamai.data.pool import PackedPool
from vishwamai.data.sources import Records
from vishwamai.experiment import Experiment
from vishwamai.tokenizer import VishwamAITokenizer


def capacity(data: ParsitData, encoder: Encoder) -> Capacity:
    """What a row holds. Raises ConfigError when P is no whole number of images."""
    one = encoder.layout.patches
    patches = one if data.max_patches is None else data.max_patches
    if patches % one:
        raise ConfigError(f"data.max_patches={patches} is no multiple of an image's {one} patches")
    return Capacity(data.max_length, patches, encoder.layout)


def batch_source(experiment: Experiment, tokenizer: VishwamAITokenizer) -> MixedBatches:
    """Global batches of packed conversations with their images, by step number.

    Raises:
        ConfigError: sizes that don't fit each other.
        DataError: files that are missing, broken, empty or longer than a row.
    """
    data: ParsitData = experiment.data
    encoder = Encoder.of(experiment.model, tokenizer, data.image_size)
    room = capacity(data, encoder)
    weighted = [[dataset] for dataset in data.datasets]
    if data.datasets[0].weight is None and data.datasets[0].generated is None:
        weighted = [data.datasets]  # files without weights are one pool
    streams = tuple(
        stream(members, data, room, encoder, (experiment.seed, number))
        for number, members in enumerate(weighted)
    )
    weights = tuple(members[0].weight or 1.0 for members in weighted)
    return MixedBatches(streams, weights, room, experiment.training.batch_size)


def stream(
    datasets: Sequence[DatasetConfig],
    data: ParsitData,
    room: Capacity,
    encoder: Encoder,
    seed: tuple[int, int],
) -> RowStream:
    """The rows of one dataset, or of several of files together."""
    if datasets[0].generated is not None:
        pages = datasets[0].pages_per_row
        if pages * encoder.layout.patches > room.patches:
            raise ConfigError(
                f"pages_per_row={pages} pages of {encoder.layout.patches} patches exceed a row's "
                f"{room.patches}: raise data.max_patches"
            )
        return GeneratedRows(datasets[0], encoder, room.tokens, seed, data.too_long)
    records = Records(datasets, seed, PageFiles)
    key = [encoder.layout.tokens, encoder.layout.patches]
    lengths = length_index(records, partial(conversations.measure, encoder=encoder), encoder.tokenizer, key)
    load = partial(conversations.load, encoder=encoder)
    return PackedPool(records, lengths, load, room, seed, data.too_long)
