"""Texts in a Python module: `pydoc_data.topics:topics` is English that every Python brings along."""

import hashlib
import importlib
from collections.abc import Mapping

from vishwamai.data.formats import text_of
from vishwamai.data.sources import DataError, kind_of


class PythonTexts:
    """A list of texts, or the values of a mapping. The module is imported.

    Raises DataError where there is no such module or attribute, or it holds something else.
    """

    def __init__(self, path: str):
        module, colon, attribute = path.partition(":")
        if not colon:
            raise DataError(f"{path} is no place in Python, expected module:attribute, as pydoc_data.topics:topics")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise DataError(f"{path} can't be imported: {error}") from None
        if not isinstance(found, Mapping | list | tuple):
            raise DataError(f"{path} is {kind_of(found)}, expected a list of texts or a mapping to texts")
        keys = list(found) if isinstance(found, Mapping) else range(len(found))
        self._names = [f"{path}[{key!r}]" for key in keys]
        self._texts = [text_of(found[key], "the value", name) for key, name in zip(keys, self._names, strict=True)]
        self.fingerprint = [path, hashlib.sha256(repr(self._texts).encode()).hexdigest()]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]

    def where(self, index: int) -> str:
        return self._names[index]
