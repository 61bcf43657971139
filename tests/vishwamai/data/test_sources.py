"""Files, lists and mixes of conversations, and what is said about broken ones."""

import json

import pytest
from pydantic import ValidationError

from vishwamai.config import ConfigError
from vishwamai.data.conversations import messages_of
from vishwamai.data.sources import DataError, FilesConfig, Records, chosen, expand_braces

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def write(path, count, start=0):
    records = [{"id": start + i, "conversations": TURNS} for i in range(count)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    else:
        path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def ids(*files, seed=(0,)):
    entries = [FilesConfig(**file) if isinstance(file, dict) else FilesConfig(json_path=file) for file in files]
    return [record.data["id"] for record in Records(entries, seed, FilesConfig)]


def test_json_and_jsonl_say_the_same(tmp_path):
    assert ids(write(tmp_path / "a.json", 5)) == ids(write(tmp_path / "a.jsonl", 5)) == [0, 1, 2, 3, 4]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": i, "conversations": TURNS}) for i in range(2)]
    path.write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\r\n  \n{lines[1]}\n".encode())
    records = Records([FilesConfig(json_path=str(path))], (0,), FilesConfig)
    assert [record.data["id"] for record in records] == [0, 1]
    assert records[1].where == f"{path} line 4 (id 1)"


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", list(range(7))),
        ("first:3", [0, 1, 2]),
        ("end:2", [5, 6]),
        ("first:20%", [0, 1]),  # 1.4 rounded up
        ("end:0.1%", [6]),
        ("first:7", list(range(7))),
    ],
)
def test_sampling_strategies(strategy, expected):
    assert chosen(strategy, 7, (0,), "a.json").tolist() == expected


@pytest.mark.parametrize(("strategy", "count"), [("random:40", 40), ("15%", 15), ("random:14.2%", 15), ("100%", 100)])
def test_random_samples_depend_on_the_seed_alone(strategy, count):
    taken = chosen(strategy, 100, (1,), "a.json").tolist()
    assert len(set(taken)) == count and taken == sorted(taken)
    assert taken == chosen(strategy, 100, (1,), "a.json").tolist()
    assert count == 100 or taken != chosen(strategy, 100, (2,), "a.json").tolist()


@pytest.mark.parametrize(
    ("strategy", "count", "taken"),
    [("0.07%", 10_000, 7), ("first:14%", 50, 7), ("end:0.07%", 10_001, 8), ("3%", 7, 1), ("first:33.3%", 1000, 333)],
)
def test_shares_are_rounded_up_exactly(strategy, count, taken):
    assert len(chosen(strategy, count, (0,), "a.json")) == taken


@pytest.mark.parametrize("strategy", ["some", "7", "first:", "last:3", "first:-1", "%"])
def test_unknown_strategies_are_refused(strategy):
    with pytest.raises(ValidationError, match="expected all, first:N"):
        FilesConfig(json_path="a.json", sampling_strategy=strategy)


def test_more_than_there_is(tmp_path):
    with pytest.raises(DataError, match=r"a\.json holds 3 examples, sampling_strategy first:4"):
        ids({"json_path": write(tmp_path / "a.json", 3), "sampling_strategy": "first:4"})


def test_braces(tmp_path):
    assert expand_braces("/x/{a,b}/{1, 2}.json") == ["/x/a/1.json", "/x/a/2.json", "/x/b/1.json", "/x/b/2.json"]
    write(tmp_path / "a.json", 2)
    write(tmp_path / "b.json", 3, start=10)
    assert ids(f"{tmp_path}/{{a,b}}.json") == [0, 1, 10, 11, 12]


def test_a_mix_in_yaml(tmp_path):
    first, second = write(tmp_path / "a.json", 4), write(tmp_path / "b.jsonl", 4, start=10)
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        f"datasets:\n  - json_path: {first}\n    sampling_strategy: first:1\n  - json_path: {second}\n",
        encoding="utf-8",
    )
    assert ids(str(mix)) == [0, 10, 11, 12, 13]
    # What is said beside the mix holds where an entry says nothing.
    assert ids({"json_path": str(mix), "sampling_strategy": "end:2"}) == [0, 12, 13]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets:\n  - json_paths: a.json", "did you mean json_path"),
        ("files: []", "expected `datasets:`"),
        ("datasets: [a.json]", r"datasets\.0 is a text"),
        ("datasets: []", r"no examples are taken from .*mix\.yaml"),
        ("datasets:\n  - {json_path: a.json, json_path: b.json}", "json_path stands there twice"),
        ("datasets:\n  - json_path: nowhere.json", r"no data file nowhere\.json"),
    ],
)
def test_broken_mixes(tmp_path, text, message):
    mix = tmp_path / "mix.yaml"
    mix.write_text(text, encoding="utf-8")
    with pytest.raises((ConfigError, DataError), match=message):
        ids(str(mix))


def test_mixes_may_name_mixes_but_not_themselves(tmp_path):
    inner, outer = tmp_path / "inner.yaml", tmp_path / "outer.yaml"
    inner.write_text(f"datasets: [{{json_path: {write(tmp_path / 'a.json', 3)}, sampling_strategy: 'end:1'}}]")
    outer.write_text(f"datasets: [{{json_path: {inner}}}, {{json_path: {inner}}}]")
    assert ids(str(outer)) == [2, 2]
    inner.write_text(f"datasets: [{{json_path: {outer}}}]")
    with pytest.raises(ConfigError, match=r"outer\.yaml names itself: .*outer\.yaml -> .*inner\.yaml -> .*outer\.yaml"):
        ids(str(outer))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n\n{"id": 2\n', r"a\.jsonl line 3 is not valid JSON: .* at column"),
        ("a.json", b'[{"id": 1},\n {"id" 2}]', r"a\.json line 2 is not valid JSON"),
        ("a line 9.json", b'[{"id": 1},\n {"id" 2}]', r"a line 9\.json line 2 is not valid JSON"),
        ("a.json", b'[1,\n"\xff"]', r"a\.json line 2 is not UTF-8: byte 0xff"),
        ("a.json", b"{}", "holds an object, expected a list"),
        ("a.json", b"[]", r"a\.json holds no examples"),
        ("a.jsonl", b"\n\n", r"a\.jsonl holds no examples"),
        ("a.jsonl", b'{"id": 1}\n[1]\n', "line 2 is a list, expected an object"),
        ("a.jsonl", b'{"id": "\xff"}\n', r"a\.jsonl line 1 is not UTF-8"),
    ],
)
def test_broken_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        ids(str(tmp_path / name))


def test_nothing_is_taken(tmp_path):
    with pytest.raises(DataError, match="no examples are taken"):
        ids({"json_path": write(tmp_path / "a.json", 3), "sampling_strategy": "first:0"})


def record(tmp_path, data):
    path = tmp_path / "one.json"
    path.write_text(json.dumps([data]), encoding="utf-8")
    return Records([FilesConfig(json_path=str(path))], (0,), FilesConfig)[0]


def test_both_spellings_of_a_conversation(tmp_path):
    expected = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert messages_of(record(tmp_path, {"conversations": TURNS})) == expected
    assert messages_of(record(tmp_path, {"messages": expected})) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"id": 7, "text": "x"}, r"item 0 \(id 7\) has id, text, expected one of `conversations`"),
        ({"conversations": []}, "expected a list of turns"),
        ({"conversations": TURNS[:1]}, "no turn of the assistant"),
        ({"conversations": [*TURNS, {"from": "human"}]}, "turn 3 is .* expected from and value"),
    ],
)
def test_broken_conversations(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        messages_of(record(tmp_path, data))
