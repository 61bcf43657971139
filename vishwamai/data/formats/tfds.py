"""TensorFlow Datasets through `tfds.data_source`, which needs no TensorFlow."""

import tensorflow_datasets as tfds

from vishwamai.data.formats import no_field, text_of
from vishwamai.data.sources import DataError


class TfdsTexts:
    """One feature of a split of a dataset that has been built in a format of random access (array_record).

    Raises DataError where it isn't built in `data_dir` (None: TFDS_DATA_DIR or ~/tensorflow_datasets), or has no
    such split or feature. Nothing is downloaded.
    """

    def __init__(self, name: str, split: str, data_dir: str | None, field: str):
        self._name, self._split, self._field = name, split, field
        try:
            self._source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        except (ValueError, RuntimeError, AssertionError, OSError) as error:
            place = data_dir or "TFDS_DATA_DIR or ~/tensorflow_datasets"
            raise DataError(
                f"tfds opens no split {split!r} of {name!r} in {place}: {str(error).splitlines()[0]} Is it built "
                f"there? `tfds build {name} --file_format=array_record` does that"
            ) from None
        info = self._source.dataset_info
        if field not in info.features:
            raise no_field(f"tfds {name}", field, info.features)
        self.fingerprint = [str(info.data_dir), split, field, len(self._source), info.as_json]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        try:
            example = self._source[index]
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{self.where(index)} can't be read: {error}") from None
        return text_of(example[self._field], self._field, self.where(index))

    def where(self, index: int) -> str:
        return f"tfds {self._name} {self._split} example {index}"
