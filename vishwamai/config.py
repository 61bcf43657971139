"""Configs: YAML -> frozen, typed, validated models, with dotted overrides and errors that name the nearest key."""

import difflib
import re
import types
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A config that cannot be used; the message says which key, what was found and what was expected."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last in silence."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class Config(BaseModel):
    """Base of every config section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError naming the file, and the line where there is one to name."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no config file {path}{hint}")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds {type(loaded).__name__}, expected a mapping of sections")
    return loaded


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `tree` with every `dotted.key=value` set; values are YAML (1e-3, true, [1, 2], null).

    In a list the key is a place: `data.datasets.0.weight=2`. Raises ConfigError for one that isn't there.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        tree = _with(tree, key.split("."), parse_value(text), override)
    return tree


def _with(tree: Any, keys: list[str], value: Any, override: str) -> Any:
    if not keys:
        return value
    name, *rest = keys
    if isinstance(tree, list):
        if not name.isdecimal() or int(name) >= len(tree):
            raise ConfigError(f"override {override!r}: {name} is no place in a list of {len(tree)}, counted from 0")
        place = int(name)
        return [*tree[:place], _with(tree[place], rest, value, override), *tree[place + 1 :]]
    section = tree if isinstance(tree, dict) else {}
    return {**section, name: _with(section.get(name), rest, value, override)}


def parse_value(text: str) -> Any:
    """A YAML scalar or flow value; unlike plain YAML 1.1, `1e-3` is a number."""
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text):
        return float(text)
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value {text!r}: {error}") from None


def validate(schema: type[Config], tree: dict[str, Any], where: str) -> Any:
    """`tree` as a `schema`. Raises ConfigError with one line per problem (unknown keys name the nearest valid one)."""
    problems = list(_unknown_keys(schema, tree))
    if not problems:
        try:
            return schema.model_validate(tree)
        except ValidationError as error:
            for item in error.errors():
                key = ".".join(str(part) for part in item["loc"]) or "config"
                found = "" if item["type"] == "missing" else f" (found {item['input']!r:.200})"
                problems.append(f"{key}: {item['msg']}{found}")
    raise ConfigError(f"{where}:\n" + "\n".join(f"  {problem}" for problem in problems))


def describe(schema: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every leaf field of a schema as (dotted key, type, default, meaning); N stands for a place in a list."""
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        nested = _section_of(field.annotation)
        if nested is not None:
            yield from describe(nested, f"{key}.")
            continue
        required = field.is_required()
        default = "required" if required else _show(field.get_default(call_default_factory=True))
        yield key, _type_name(field.annotation), default, field.description or ""
        element = _element_of(field.annotation)
        if element is not None:
            yield from describe(element, f"{key}.N.")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    keys = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            keys.append(f"{prefix}{name}")
    return keys


def dump_yaml(config: Config) -> str:
    """The resolved config, every field written out, in declaration order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _unknown_keys(schema: type[Config], tree: Any, prefix: str = "", root: type[Config] | None = None) -> Iterator[str]:
    if not isinstance(tree, dict):
        return
    root = root or schema
    for key, value in tree.items():
        if key not in schema.model_fields:
            # The key may be right and stand in the wrong section: say where it lives.
            hints = [path for path, *_ in describe(root) if path.split(".")[-1] == key]
            near = difflib.get_close_matches(str(key), list(schema.model_fields), 1, cutoff=0.5)
            hints += [f"{prefix}{name}" for name in near]
            told = f"did you mean {hints[0]}?" if hints else "valid: " + ", ".join(schema.model_fields)
            yield f"{prefix}{key} is not a key; {told}"
            continue
        annotation = schema.model_fields[key].annotation
        section = _section_of(annotation)
        if section is not None:
            yield from _unknown_keys(section, value, f"{prefix}{key}.", root)
        elif isinstance(value, list):
            element = _element_of(annotation)
            for index, item in enumerate(value if element else ()):
                yield from _unknown_keys(element, item, f"{prefix}{key}.{index}.", root)


def _section_of(annotation: Any) -> type[Config] | None:
    """The Config class behind `X`, `X | None` or `Annotated[X, ...]`; None when it is a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        found = [_section_of(arg) for arg in get_args(annotation)]
        found = [section for section in found if section is not None]
        return found[0] if len(found) == 1 else None
    return None


def _element_of(annotation: Any) -> type[Config] | None:
    for arg in get_args(annotation):
        section = _section_of(arg) or _element_of(arg)
        if section is not None:
            return section
    return None


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(member.value for member in annotation)
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b(?:\w+\.)+", "", str(annotation)).replace("NoneType", "None")


def _show(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return "null" if value is None else str(value)
