"""JSON Lines: a document per line, in one field of its object."""

from pathlib import Path

from vishwamai.data.formats import no_field, text_of
from vishwamai.data.sources import DataError, JsonLines, kind_of, stamp


class JsonlTexts:
    """One field of each line of a file. Raises DataError for a line that is no JSON object with a text there."""

    def __init__(self, path: Path, field: str):
        self._lines, self._field = JsonLines(path), field
        self.fingerprint = [field, stamp(path)]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        data, where = self._lines[index]
        if not isinstance(data, dict):
            raise DataError(f"{where} is {kind_of(data)}, expected an object with a field {self._field!r}")
        if self._field not in data:
            raise no_field(where, self._field, data)
        return text_of(data[self._field], self._field, where)

    def where(self, index: int) -> str:
        return self._lines.where(index)
