"""YAML and overrides -> validated configs, and what is said about the ones that can't be used."""

from enum import StrEnum

import pytest
from pydantic import Field

from vishwamai import experiment as experiments
from vishwamai import families
from vishwamai.config import (
    Config,
    ConfigError,
    apply_overrides,
    describe,
    differences,
    dump_yaml,
    parse_value,
    read_yaml,
    validate,
)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Part(Config):
    size: int = Field(1, gt=0, description="how big")
    colour: Colour = Field(Colour.RED, description="which one")


class Rate(Config):
    learning_rate: float = Field(1e-3, description="how fast")


class Whole(Config):
    name: str = Field(description="what it is called")
    optimizer: Rate = Field(Rate(), description="the rate")
    parts: list[Part] = Field([], description="the parts")
    limit: int | None = Field(None, description="how many")


TREE = {"name": "x", "parts": [{"size": 2}, {"size": 3}]}


# --- overrides ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2.5E+2", -250.0),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("{a: b}", {"a": "b"}),
        ("runs/1e3/x", "runs/1e3/x"),
        ("'1e3'", "1e3"),  # quoted: a text
        ("inf", "inf"),
        ("", None),
    ],
)
def test_values_of_overrides(text, value):
    found = parse_value(text)
    assert found == value and type(found) is type(value)


def test_overrides_reach_into_sections_and_lists_and_leave_the_original():
    tree = {"name": "x", "parts": [{"size": 2}, {"size": 3}]}
    found = apply_overrides(tree, ["optimizer.learning_rate=1e-2", "parts.1.size=9", "name=a=b", "limit=4", "limit=5"])
    assert found == {
        "name": "a=b",
        "parts": [{"size": 2}, {"size": 9}],
        "optimizer": {"learning_rate": 0.01},
        "limit": 5,
    }
    assert tree == TREE


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("name=[1", "cannot read the value"),
        ("parts.2.size=1", "2 is no place in a list of 2"),
        ("parts.size=1", "size is no place in a list of 2"),
    ],
)
def test_overrides_that_cannot_be_applied(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(TREE, [override])


# --- files ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "line 1"),
        (b"a: 1\nb:\n  c: 2\n  c: 3\n", "c stands there twice\n.*line 4"),
        (b"a: 1\na: 1\n", "a stands there twice"),
        (b"- 1\n", "holds list, expected a mapping"),
        (b"", "holds NoneType, expected a mapping"),
        (b"a: \xff\n", "not valid YAML: .*utf-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert str(path) in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "parsit_tiny.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"no config file .*; did you mean .*parsit_tiny\.yaml\?"):
        read_yaml(tmp_path / "parsit_tyni.yaml")


# --- validation ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "y"}, "nam is not a key; did you mean name?"),
        (
            {"optimizer": {"lerning_rate": 1}},
            "optimizer.lerning_rate is not a key; did you mean optimizer.learning_rate?",
        ),
        ({"parts": [{}, {"sise": 1}]}, "parts.1.sise is not a key; did you mean parts.1.size?"),
        # Right, but in the wrong section.
        ({"learning_rate": 1}, "learning_rate is not a key; did you mean optimizer.learning_rate?"),
        ({"optimizer": {"limit": 1}}, "optimizer.limit is not a key; did you mean limit?"),
        ({"zzz": 1}, "zzz is not a key; valid: name, optimizer, parts, limit"),
        ({"optimizer": 3}, "optimizer: Input should be a valid dictionary"),
        ({"parts": [{"size": 0}]}, "parts.0.size: Input should be greater than 0 (found 0)"),
        ({"parts": [{"colour": "green"}]}, "parts.0.colour: Input should be 'red' or 'blue' (found 'green')"),
        ({"name": None}, "name: Input should be a valid string (found None)"),
    ],
)
def test_errors_name_the_key_and_the_nearest_valid_one(change, message):
    with pytest.raises(ConfigError) as error:
        validate(Whole, TREE | change, "x.yaml")
    assert str(error.value).startswith(f"x.yaml:\n  {message}")


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        validate(Whole, TREE | {"nam": 1, "optimizer": {"lr": 2}}, "x.yaml")
    assert "nam is not a key" in str(error.value) and "optimizer.lr is not a key" in str(error.value)
    with pytest.raises(ConfigError, match="name: Field required$"):
        validate(Whole, {}, "x.yaml")


def test_configs_are_frozen_and_come_back_from_their_yaml(tmp_path):
    config = validate(Whole, TREE | {"optimizer": {"learning_rate": "1e-8"}}, "x.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "y"
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert validate(Whole, read_yaml(path), "again") == config


def test_differences_are_dotted_keys():
    old, new = TREE | {"optimizer": {"learning_rate": 1, "b": 2}}, TREE | {"optimizer": {"learning_rate": 3, "b": 2}}
    assert differences(old, new) == ["optimizer.learning_rate"]
    assert differences(old, {"name": "x", "new": 1}) == ["parts", "optimizer", "new"]


# --- help ---


def test_every_field_is_described_once():
    assert list(describe(Whole)) == [
        ("name", "str", "required", "what it is called"),
        ("optimizer.learning_rate", "float", "0.001", "how fast"),
        ("parts", "list[Part]", "[]", "the parts"),
        ("parts.N.size", "int", "1", "how big"),
        ("parts.N.colour", "red|blue", "red", "which one"),
        ("limit", "int | None", "null", "how many"),
    ]


@pytest.mark.parametrize("family", families.names())
def test_every_field_of_an_experiment_has_a_meaning(family):
    fields = list(describe(experiments.schema(family)))
    assert len(fields) > 40
    assert [key for key, _, _, meaning in fields if not meaning] == []


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ConfigError, match="'parsitt' is not a model family; did you mean parsit?"):
        experiments.parse({"family": "parsitt"}, "x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml: no `family`; registered: .*parsit"):
        experiments.parse({}, "x.yaml")
