"""Formats of text documents. Each gives texts by number, with few bytes of memory for each, to several threads."""

from typing import Any, Protocol

from vishwamai.data.sources import DataError, kind_of


class Texts(Protocol):
    """Texts by number. `fingerprint` (JSON) is another when the texts are others."""

    fingerprint: list[Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str:
        """A text. Raises DataError where there is none, saying `where`."""
        ...

    def where(self, index: int) -> str:
        """What errors call it: its file, and its line or row."""
        ...


def text_of(value: Any, field: str, where: str) -> str:
    """The text that stands in a field. Raises DataError for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: {field} is not UTF-8: byte {value[error.start]:#04x}") from None
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {kind_of(value)}, expected a text")
    return value


def no_field(where: str, field: str, fields: Any) -> DataError:
    """The error that says which fields there are."""
    return DataError(f"{where} has no field {field!r}, it has {', '.join(fields) or 'none'}: set text_field")
