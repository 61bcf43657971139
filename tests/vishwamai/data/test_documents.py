"""Documents of every format: the same texts by number, few bytes each; and what is wrong is named with its place."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from vishwamai.data.documents import DocumentsConfig, open_documents
from vishwamai.data.sources import DataError

TEXTS = ["The first.", "Second, with\na line break.", "Третий", "  fourth\t", "fifth 🦄"]


def read(path, seed=0, **options):
    return list(open_documents([DocumentsConfig(path=str(path), **options)], seed))


def table(texts=TEXTS, name="text"):
    return pa.table({"id": list(range(len(texts))), name: texts})


def text_folder(folder):
    for number, text in enumerate(TEXTS):
        (folder / "sub").mkdir(exist_ok=True)
        (folder / ("sub" if number > 2 else ".") / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "notes.log").write_text("not a document")
    return folder


def separated(folder):
    path = folder / "all.txt"
    path.write_bytes("\n\n====\n\n\n".join(TEXTS).encode())
    return path


def jsonl(folder, name="a.jsonl", texts=TEXTS):
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)))
    return path


def parquet(folder, name="a.parquet", texts=TEXTS, **options):
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(table(texts), path, row_group_size=2, **options)
    return path


def saved(folder):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def saved_splits(folder):
    train = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict(train=train, test=train.select([4, 0])).save_to_disk(folder / "splits")
    return folder / "splits"


def hub(folder):
    parquet(folder, "data/train-00000-of-00002.parquet", TEXTS[:3])
    parquet(folder, "data/train-00001-of-00002.parquet", TEXTS[3:], compression="zstd")
    parquet(folder, "data/test-00000-of-00001.parquet", TEXTS[:1])
    (folder / "README.md").write_text("# a card")
    return folder


def hub_jsonl(folder):
    jsonl(folder, "train/0.jsonl")
    jsonl(folder, "validation/0.jsonl", ["no"])
    return folder


def hub_unnamed(folder):
    jsonl(folder, "part0.jsonl", TEXTS[:1])
    jsonl(folder, "trainee.jsonl", TEXTS[1:])
    return folder


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (text_folder, {}),
        (text_folder, {"format": "text"}),
        (separated, {"separator": "===="}),
        (jsonl, {}),
        (lambda folder: jsonl(folder, "a.json"), {"format": "jsonl"}),
        (parquet, {}),
        (lambda folder: parquet(folder).rename(folder / "plain"), {"format": "parquet"}),
        (saved, {}),
        (saved, {"format": "hf"}),
        (saved_splits, {}),
        (saved_splits, {"split": "train"}),
        (hub, {}),
        (hub_jsonl, {"format": "hf"}),
        (hub_unnamed, {}),
    ],
)
def test_every_format_gives_the_same_texts(tmp_path, make, options):
    path = make(tmp_path)
    assert read(path, **options) == TEXTS
    documents = open_documents([DocumentsConfig(path=str(path), **options)] * 2, 0)
    assert [documents[index] for index in (9, 3, 5)] == [TEXTS[4], TEXTS[3], TEXTS[0]]
    with pytest.raises(IndexError):
        documents[10]


def test_other_splits(tmp_path):
    assert read(saved_splits(tmp_path), split="test") == [TEXTS[4], TEXTS[0]]
    assert read(hub(tmp_path / "hub"), split="test") == TEXTS[:1]


def test_places(tmp_path):
    def where(path, index, **options):
        return open_documents([DocumentsConfig(path=str(path), **options)], 0).where(index)

    assert where(separated(tmp_path), 2, separator="====") == f"{tmp_path}/all.txt line 12"
    assert (tmp_path / "all.txt").read_text().splitlines()[11] == TEXTS[2]
    assert where(jsonl(tmp_path), 2) == f"{tmp_path}/a.jsonl line 5"
    assert where(parquet(tmp_path), 3) == f"{tmp_path}/a.parquet row 3"
    assert where(saved(tmp_path), 4) == f"{tmp_path}/saved/data-00001-of-00002.arrow row 1"
    assert where(text_folder(tmp_path / "saved"), 0, format="text") == f"{tmp_path}/saved/0.txt"


def test_lists_globs_and_strategies(tmp_path):
    text_folder(tmp_path)
    jsonl(tmp_path)
    assert read(f"{tmp_path}/{{2,0}}.txt") == [TEXTS[2], TEXTS[0]]
    assert read(f"{tmp_path}/?.txt") == TEXTS[:3]
    assert read(f"{tmp_path}/**/*.txt") == TEXTS
    # Counted over all files of an entry, not per file.
    assert read(tmp_path, format="text", sampling_strategy="end:2") == TEXTS[3:]
    drawn = read(tmp_path / "a.jsonl", sampling_strategy="random:2", seed=3)
    assert drawn == read(tmp_path / "a.jsonl", sampling_strategy="random:2", seed=3)
    assert len({tuple(read(tmp_path / "a.jsonl", sampling_strategy="random:2", seed=seed)) for seed in range(9)}) > 1
    (tmp_path / "[odd].txt").write_text("named oddly")
    assert read(tmp_path / "[odd].txt") == ["named oddly"]


def test_a_blank_line_between_documents(tmp_path):
    """Line breaks of any number; a mark of byte order; nothing at the end is no document."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\nmore\n\n\n\n  two\n\n\n   \n\nthree\n\n")
    documents = open_documents([DocumentsConfig(path=str(path), separator="\n\n")], 0)
    assert list(documents) == ["one\nmore", "  two", "three"]
    assert [documents.where(n) for n in range(3)] == [f"{path} line {line}" for line in (1, 6, 11)]


def test_texts_in_python():
    import pydoc_data.topics

    path = "pydoc_data.topics:topics"
    documents = open_documents([DocumentsConfig(path=path, format="python")], 0)
    assert list(documents) == list(pydoc_data.topics.topics.values())
    assert documents.where(0) == f"{path}[{next(iter(pydoc_data.topics.topics))!r}]"


def test_a_large_parquet_file_is_not_held(tmp_path):
    """Only the row groups read last are in memory."""
    texts = [f"{n:06d}" * 500 for n in range(2_000)]
    pq.write_table(table(texts), tmp_path / "a.parquet", row_group_size=20)
    documents = open_documents([DocumentsConfig(path=str(tmp_path / "a.parquet"))], 0)
    before, most = pa.total_allocated_bytes(), 0
    for index in (*range(0, 2_000, 7), *range(1_999, 0, -11)):
        assert documents[index] == texts[index]
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < sum(map(len, texts)) / 4


def test_large_row_groups_are_told_of(tmp_path, monkeypatch, caplog):
    from vishwamai.data.formats import parquet as module

    monkeypatch.setattr(module, "LARGE_GROUP", 10)
    read(parquet(tmp_path))
    assert "written anew with row_group_size=1000" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}', {}, r"a\.jsonl line 2: text is a int, expected a text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', {}, r"a\.jsonl line 2: text is null"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}', {}, r"line 3 has no field 'text', it has body: set text_field"),
        ("a.jsonl", b'{"text": "x"}\n["text"]', {}, r"line 2 is a list, expected an object with a field 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"', {}, r"a\.jsonl line 2 is not valid JSON"),
        ("a.jsonl", b"\n", {}, r"a\.jsonl holds no documents"),
        ("a.txt", b"good\n\nbad \xff", {}, r"a\.txt line 3 is not UTF-8: byte 0xff"),
        ("a.txt", b"good\n\nbad \xff", {"separator": "\n\n"}, r"a\.txt line 3 is not UTF-8: byte 0xff"),
        ("a.txt", b"\n\n\n", {"separator": "\n\n"}, r"a\.txt holds no documents"),
        ("a.parquet", b"PAR1 no", {}, r"a\.parquet is not a Parquet file"),
        ("a.csv", b"text\nx", {}, r"a\.csv ends in none of \.txt, \.jsonl, \.parquet: say its format, one of text,"),
        ("a.txt", b"x", {"format": "hf"}, r"no folder .*a\.txt, and a Hugging Face dataset is one"),
        ("a.jsonl", b'{"text": "x"}', {"separator": "-"}, "has no plain text, and only that has a separator"),
        ("a.txt", b"x", {"sampling_strategy": "first:2"}, r"a\.txt holds 1 examples, sampling_strategy first:2"),
        ("a.txt", b"x", {"sampling_strategy": "first:0"}, r"no documents are taken from .*a\.txt"),
    ],
)
def test_broken_files_say_where_it_is(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, **options)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("gone.txt", {}, r"no data file .*gone\.txt \(from the folder"),
        ("*.txt", {}, r"no data file .*\*\.txt"),
        ("", {}, r"is no dataset: it holds README\.rst, expected files that end in \.txt, \.jsonl, \.parquet, or what"),
        ("", {"format": "jsonl"}, "no jsonl file "),
        ("", {"format": "hf"}, r"is no Hugging Face dataset: expected state\.json or dataset_dict\.json"),
    ],
)
def test_nothing_there(tmp_path, path, options, message):
    (tmp_path / "README.rst").write_text("x")
    with pytest.raises(DataError, match=message):
        read(f"{tmp_path}/{path}", **options)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pydoc_data.topics", "expected module:attribute"),
        ("pydoc_data.nowhere:topics", "can't be imported: No module named"),
        ("pydoc_data.topics:nothing", "can't be imported: .*nothing"),
        ("sys:path_hooks", r"sys:path_hooks\[0\]: the value is a"),
        ("sys:version", "sys:version is a text, expected a list of texts"),
    ],
)
def test_no_texts_in_python(path, message):
    with pytest.raises(DataError, match=message):
        read(path, format="python")


def test_a_damaged_row_group_says_its_rows(tmp_path):
    path = parquet(tmp_path, compression="none", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    start = raw.index(TEXTS[2].encode())
    raw[start - 40 : start] = bytes(40)
    path.write_bytes(raw)
    documents = open_documents([DocumentsConfig(path=str(path))], 0)
    assert documents[0] == TEXTS[0]
    with pytest.raises(DataError, match=r"a\.parquet is damaged: rows 2 to 3 can't be read"):
        documents[2]


def test_columns_without_text(tmp_path):
    pq.write_table(table(), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="text") == TEXTS
    with pytest.raises(DataError, match=r"a\.parquet has no field 'body', it has id, text: set text_field"):
        read(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(DataError, match=r"a\.parquet row 0: id is a int"):
        read(tmp_path / "a.parquet", text_field="id")
    pq.write_table(table(["x", None]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet row 1: text is null"):
        read(tmp_path / "b.parquet")


def test_broken_hugging_face_folders(tmp_path):
    folder = saved_splits(tmp_path)
    with pytest.raises(DataError, match="splits has no split 'dev', it has train, test: set split"):
        read(folder, split="dev")
    with pytest.raises(DataError, match="train has no split 'test', it has no named one"):
        read(folder / "train", split="test")
    with pytest.raises(DataError, match=r"\.arrow has no field 'body', it has text"):
        read(folder, text_field="body")
    with pytest.raises(DataError, match="has no files of the split dev, it has test-00000"):
        read(hub(tmp_path / "hub"), split="dev")
    for path in (tmp_path / "hub" / "data").glob("train*"):
        path.unlink()
    with pytest.raises(DataError, match="has no files of the split train, it has test-00000.*: set split"):
        read(tmp_path / "hub")
    next((folder / "train").glob("*.arrow")).write_bytes(b"no")
    with pytest.raises(DataError, match=r"\.arrow is not an Arrow stream"):
        read(folder)
    (folder / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json is not what save_to_disk writes: KeyError"):
        read(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "text", "text_field": "body"}, "text_field has no meaning for format=text"),
        ({"format": "jsonl", "separator": "-"}, "separator has no meaning for format=jsonl"),
        ({"format": "parquet", "split": "test"}, "split has no meaning for format=parquet"),
        ({"data_dir": "x"}, "data_dir has no meaning for format=auto"),
        ({"format": "csv"}, "'text', 'jsonl', 'parquet', 'hf', 'tfds' or 'python'"),
        ({"sampling_strategy": "some"}, "expected all, first:N"),
    ],
)
def test_settings_that_mean_nothing(options, message):
    with pytest.raises(ValidationError, match=message):
        DocumentsConfig(path="a", **options)


# --- tfds ---


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A dataset that tfds itself built, without TensorFlow."""
    import tensorflow_datasets as tfds

    class Tales(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:2])}

        def _generate_examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text, "number": number}

    folder = tmp_path_factory.mktemp("tfds")
    Tales(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tfds_config(folder, **options):
    return DocumentsConfig(**{"path": "tales", "format": "tfds", "data_dir": str(folder), **options})


def test_tfds_without_tensorflow(built):
    documents = open_documents([tfds_config(built)], 0)
    assert sorted(documents) == sorted(TEXTS) and documents[3] == documents[3]  # tfds shuffles what it builds
    assert documents.where(3) == "tfds tales train example 3"
    assert sorted(open_documents([tfds_config(built, split="test")], 0)) == sorted(TEXTS[:2])
    assert list(open_documents([tfds_config(built, split="train[3:]", path="tales:1.0.0")], 0)) == list(documents)[3:]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "tfds opens no split 'train' of 'nowhere' in .*Is it built there. `tfds build nowhere"),
        ({"path": "imdb_reviews"}, "tfds opens no split 'train' of 'imdb_reviews' in .*Is it built there"),
        ({"split": "dev"}, "tfds opens no split 'dev' of 'tales' in .*Unknown split 'dev'"),
        ({"text_field": "body"}, "tfds tales has no field 'body', it has .*: set text_field"),
        ({"text_field": "number"}, "tfds tales train example 0: number is a int"),
    ],
)
def test_tfds_that_is_not_there(built, options, message):
    with pytest.raises(DataError, match=message):
        list(open_documents([tfds_config(built, **options)], 0))
    assert "tensorflow" not in sys.modules


def test_damaged_tfds_files_say_the_example(built, tmp_path):
    (record,) = (built / "tales" / "1.0.0").glob("*test*")
    good = record.read_bytes()
    try:
        record.write_bytes(good[:64] + bytes(byte ^ 0x5A for byte in good[64:400]) + good[400:])
        with pytest.raises(DataError, match="tfds tales test example 0 can't be read"):
            list(open_documents([tfds_config(built, split="test")], 0))
    finally:
        record.write_bytes(good)
