import json
from collections import Counter

import pytest
from PIL import Image

from parsit_jax.documents.generator import Split, fonts_of, layouts_of
from parsit_jax.evaluation.benchmarks import BENCHMARKS, QUESTIONS_PER_PAGE, BenchmarkError, load_benchmarks

GENERATED = [name for name, benchmark in BENCHMARKS.items() if benchmark.recognises is None]


@pytest.fixture
def receipts(tmp_path):
    """A folder laid out as SROIE, with one receipt that lacks two labels."""
    rows = [
        {
            "id": "7",
            "image": "img/7.jpg",
            "label": {"company": "ACME", "date": "1/2/2018", "address": "A", "total": "9.00"},
        },
        {"id": "8", "image": "img/8.jpg", "label": {"company": "BETA", "date": " ", "total": ""}},
    ]
    folder = tmp_path / "receipts"
    (folder / "img").mkdir(parents=True)
    for row in rows:
        Image.new("L", (20, 30)).save(folder / row["image"])
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.mark.parametrize("name", GENERATED)
def test_generated_questions(name):
    examples = list(load_benchmarks([name])[name])
    assert len(examples) >= 300
    assert len({example.id for example in examples}) == len(examples)
    pages = Counter(example.page for example in examples)
    assert max(pages.values()) <= QUESTIONS_PER_PAGE and len(pages) >= 100
    assert all(example.question and example.answers[0] for example in examples)
    for other in load_benchmarks([name], seed=1)[name]:
        assert other.page not in pages
        break


def test_generated_is_the_same_every_time():
    def describe(seed):
        examples = load_benchmarks(["generated"], seed=seed)["generated"]
        return [(e.id, e.question, e.answers, e.image.tobytes()) for e in examples]

    assert describe(0) == describe(0)
    assert not {row[3] for row in describe(0)} & {row[3] for row in describe(1)}


def test_layouts_and_fonts_are_unseen_but_in_the_ablation():
    for name, split in (("generated", Split.HELD_OUT), ("generated_seen_layouts", Split.TRAIN)):
        examples = list(load_benchmarks([name])[name])
        assert {e.groups["layout"] for e in examples} == set(layouts_of("receipts", split))
        assert {e.groups["font"] for e in examples} == set(fonts_of(split))
    assert not set(layouts_of("receipts", Split.TRAIN)) & set(layouts_of("receipts", Split.HELD_OUT))


def test_sroie_asks_for_labelled_fields_only(receipts):
    examples = list(load_benchmarks(["sroie"], [f"sroie={receipts}"])["sroie"])
    assert [example.id for example in examples] == [
        "7-company",
        "7-date",
        "7-address",
        "7-total",
        "8-company",
    ]
    assert examples[3].answers == ("9.00",) and examples[3].groups == {"field": "total"}
    assert examples[4].image == receipts / "img" / "8.jpg"


def test_a_bare_folder_is_recognised(shared):
    examples = list(load_benchmarks(["sroie"], [str(shared / "sroie")])["sroie"])
    rows = [json.loads(line) for line in (shared / "sroie" / "validation.jsonl").open(encoding="utf-8")]
    assert len(examples) == sum(bool(value) for row in rows for value in row["label"].values())
    assert all(example.image.is_file() for example in examples)


def test_a_folder_whose_first_line_is_blank_and_ids_are_numbers(receipts):
    path = receipts / "validation.jsonl"
    path.write_text("\n" + path.read_text().replace('"7"', "7"))
    (first, *_) = load_benchmarks(["sroie"], [str(receipts)])["sroie"]
    assert (first.id, first.page) == ("7-company", "7")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b'{"label": {"colour": "red"}}', b'{"label": {}}'])
def test_a_folder_of_something_else_is_not_recognised(tmp_path, content):
    (tmp_path / "validation.jsonl").write_bytes(content)
    with pytest.raises(BenchmarkError, match="looks like no benchmark's data"):
        load_benchmarks(["sroie"], [str(tmp_path)])


def test_a_folder_with_an_equals_sign_in_its_name(receipts):
    renamed = receipts.rename(receipts.with_name("a=b"))
    assert len(list(load_benchmarks(["sroie"], [str(renamed)])["sroie"])) == 5


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (["genrated_tables"], [], "unknown benchmark 'genrated_tables': did you mean 'generated_tables'"),
        (["qqq"], [], "unknown benchmark 'qqq': Known: generated,"),
        (
            ["generated", "sroie"],
            [],
            "benchmark 'sroie' needs data, and none was given: add --data sroie=DIR",
        ),
        (["sroie"], ["sroi={receipts}"], "did you mean 'sroie'"),
        (["sroie"], ["sroie={receipts}/none"], "should be a folder, and there is none at"),
        (["sroie"], ["{receipts}/none"], "is no folder"),
        (
            ["sroie"],
            ["{receipts}/img"],
            "looks like no benchmark's data, expected one of these: sroie: valid",
        ),
        (["sroie"], ["sroie={receipts}/img"], "does not look like 'sroie': expected validation.jsonl"),
        (["sroie"], ["sroie={receipts}", "{receipts}"], "two folders for 'sroie'"),
        (["generated"], ["generated={receipts}"], "'generated' draws its own pages: leave out --data gen"),
        (["generated"], ["{receipts}"], "holds 'sroie', not one of the benchmarks generated"),
    ],
)
def test_wrong_names_and_data(receipts, names, data, message):
    with pytest.raises(BenchmarkError) as error:
        load_benchmarks(names, [entry.format(receipts=receipts) for entry in data])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "9", "ima', "validation.jsonl, line 3: not JSON"),
        ('{"id": "9", "label": {}}', "line 3: expected an object with ('id', 'image', 'label'), no 'image'"),
        ("[]", "line 3: expected an object"),
        ('{"id": "9", "image": "img/9.jpg", "label": {}}', "receipt 9 names the image"),
        ('{"id": 9, "image": "img/8.jpg", "label": "9.00"}', "receipt 9 has the label '9.00', expected an object"),
        ("\udcff", "line 3: not JSON"),
    ],
)
def test_malformed_sroie_rows(receipts, line, message):
    with (receipts / "validation.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(BenchmarkError) as error:
        list(load_benchmarks(["sroie"], [str(receipts)])["sroie"])
    assert message in str(error.value)
