"""Reading a Hugging Face config.json: each key has a place in our config, or a value that we insist on."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from vishwamai.config import Config, ConfigError

_REQUIRED = object()


class Reader:
    """A section of a config.json. Keys that are absent have Transformers' default, as older files leave those out."""

    def __init__(self, section: Mapping[str, Any], where: str):
        self.section = section
        self.where = where

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key; null counts as absent."""
        value = self.section.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self.where} has no {key}")
        return default

    def insist(self, key: str, allowed: Iterable[Any], because: str) -> None:
        """Raises ConfigError when the key is there with another value: never computed differently in silence."""
        allowed = tuple(allowed)
        value = self.section.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed)) or "none"
            raise ConfigError(f"{self.where}: {key}={value!r} can't be computed here, expected {expected}: {because}")

    def inner(self, key: str) -> "Reader":
        """A nested section."""
        section = self.get(key)
        if not isinstance(section, Mapping):
            raise ConfigError(f"{self.where}: {key} is {type(section).__name__}, expected a mapping")
        return Reader(section, f"{self.where}: {key}")


def build(schema: type[Config], where: str, **values: Any) -> Any:
    """A config from values that came out of a config.json. Raises ConfigError naming the file's section."""
    try:
        return schema(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{where}: {problems}") from None
