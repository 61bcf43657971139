"""Parquet: a document per row, in one column."""

import logging
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vishwamai.data.formats import no_field, text_of
from vishwamai.data.sources import DataError, stamp

# Row groups are read whole: this many stay in memory (of all files together), and larger ones are told of.
KEPT_GROUPS = 4
LARGE_GROUP = 32_000_000  # bytes

logger = logging.getLogger(__name__)


class ParquetTexts:
    """One column of a file. A row group is read when one of its rows is asked for; the last ones are kept.

    Training asks in random order: small row groups (1,000 rows) make it fast. Raises DataError for a file that is
    none or has no such column, and for rows that can't be read or hold no text.
    """

    def __init__(self, path: Path, field: str):
        self._path, self._field = path, field
        try:
            self._metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a Parquet file: {error}") from None
        schema = self._metadata.schema.to_arrow_schema()
        if field not in schema.names:
            raise no_field(str(path), field, schema.names)
        groups = [self._metadata.row_group(number) for number in range(self._metadata.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        self.fingerprint = [field, stamp(path)]
        largest = max((_column_bytes(group, field) for group in groups), default=0)
        if largest > LARGE_GROUP:
            logger.warning(
                "%s has row groups of up to %s MB, and each is read for one document: written anew with "
                "row_group_size=1000, it is read faster",
                path,
                largest // 10**6,
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        try:
            column = _column(self, group)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self._path} is damaged: rows {start} to {self._ends[group] - 1} can't be read: {error}"
            ) from None
        return text_of(column[index - start].as_py(), self._field, self.where(index))

    def where(self, index: int) -> str:
        return f"{self._path} row {index}"

    def column(self, group: int) -> pa.ChunkedArray:
        """The texts of a row group. The file is opened anew, so that threads don't share its position."""
        with pq.ParquetFile(self._path, metadata=self._metadata) as file:
            return file.read_row_group(group, columns=[self._field], use_threads=False).column(0)


@lru_cache(KEPT_GROUPS)
def _column(texts: ParquetTexts, group: int) -> pa.ChunkedArray:
    return texts.column(group)


def _column_bytes(group: pq.RowGroupMetaData, field: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
