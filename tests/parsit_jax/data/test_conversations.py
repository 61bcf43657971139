"""Files of conversations about images -> batches, and what is said about broken ones."""

import json

import numpy as np
import pytest
from PIL import Image

from parsit_jax.data.batches import batch_source
from parsit_jax.data.config import PageFiles
from parsit_jax.data.conversations import parse
from vishwamai.data.sources import DataError, Record

COUNT = 11


def conversation(*turns):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(turns)]


def page(n):
    return Image.new("RGB", (60 + n, 50), (n * 20, 0, 0))


@pytest.fixture
def folder(tmp_path):
    """COUNT conversations about pages of their own; every third has two pages, every fourth none."""
    records = []
    for n in range(COUNT):
        names = [] if n % 4 == 3 else [f"{n}.png", f"{n}b.png"] if n % 3 == 2 else [f"{n}.png"]
        for name in names:
            page(n).save(tmp_path / name)
        turns = conversation("<image>\n" * len(names) + f"Which {n}?", f"Page {n}.", "Sure?", "Yes." * (n + 1))
        records.append({"id": f"r{n}", "image": names, "conversations": turns})
    (tmp_path / "a.json").write_text(json.dumps(records))
    return tmp_path


def source_of(experiment, tokenizer, folder, name="a.json", **options):
    options = {"max_length": 300, "max_patches": 192} | options
    return batch_source(experiment({"json_path": str(folder / name)}, **options), tokenizer)


def test_every_conversation_once_an_epoch_with_its_own_pages(experiment, tokenizer, folder):
    source = source_of(experiment, tokenizer, folder)
    rows = len(source.streams[0].plan)
    assert rows < COUNT  # rows are shared
    seen = []
    for row in range(rows):
        examples = source.row(row)
        assert sum(len(example.tokens) for example in examples) <= 300
        assert sum(len(example.images) for example in examples) <= 3
        for example in examples:
            answers = tokenizer.decode(example.tokens[example.loss_weights > 0]).split("<|im_end|>")
            n = int(answers[0].removeprefix("Page ").removesuffix("."))
            assert answers == [f"Page {n}.", "Yes." * (n + 1), ""]
            assert [image[0, 0] for image in example.images] == [n * 20] * (0 if n % 4 == 3 else 2 if n % 3 == 2 else 1)
            assert (example.feature_index >= 0).sum() == 64 * len(example.images)
            seen.append(n)
    assert sorted(seen) == list(range(COUNT))


def test_batches_are_the_same_after_a_restart(experiment, tokenizer, folder):
    for step in (0, 7, 10**6):
        first, second = (source_of(experiment, tokenizer, folder).batch(step) for _ in range(2))
        for name, array in first.as_dict().items():
            np.testing.assert_array_equal(array, second.as_dict()[name])


def test_files_without_weights_are_one_pool_and_with_weights_a_mixture(experiment, tokenizer, folder):
    path = str(folder / "a.json")
    pool = batch_source(experiment({"json_path": path}, {"json_path": path}, max_patches=192), tokenizer)
    assert len(pool.streams) == 1 and len(pool.streams[0].records) == 2 * COUNT
    datasets = {"json_path": path, "weight": 1}, {"generated": "receipts", "weight": 1}
    mixed = batch_source(experiment(*datasets, max_patches=192), tokenizer)
    assert len(mixed.streams) == 2 and mixed.weights == (1, 1)
    mixed.batch(0)


def record(data, **files):
    from pathlib import Path

    return Record(data, "a.json item 0", Path("data/a.json"), PageFiles(json_path="data/a.json", **files))


def test_marks_become_image_items_without_their_line_break():
    turns = conversation("<image>\nWhat?", "A", "And\n<image>", "B <image>", "<image><image> x", "C")
    found = parse(record({"image": ["1.png", "2.png", "/x/3.png", "4.png"], "conversations": turns}))
    image, text = {"type": "image"}, lambda text: {"type": "text", "text": text}
    assert [message["content"] for message in found.messages] == [
        [image, text("What?")],
        [text("A")],
        [text("And"), image],
        [text("B <image>")],  # what the assistant says is text
        [image, image, text(" x")],
        [text("C")],
    ]
    assert [str(path) for path in found.images] == ["data/1.png", "data/2.png", "/x/3.png", "data/4.png"]


def test_image_folder_and_paths_inside_messages():
    content = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
    found = parse(record({"messages": messages}, image_folder="pages"))
    assert [str(path) for path in found.images] == ["pages/1.png"]
    assert found.messages[0]["content"] == [{"type": "image"}, content[1]]


def test_images_stand_under_either_key():
    talk = conversation("<image>\nQ", "A")
    for images in ({"image": None, "images": ["1.png"]}, {"image": [], "images": "1.png"}, {"image": "1.png"}):
        assert [path.name for path in parse(record({"conversations": talk} | images)).images] == ["1.png"]
    with pytest.raises(DataError, match="1 <image> marks .* and 2 images"):
        parse(record({"conversations": talk, "image": "1.png", "images": ["2.png"]}))


def break_it(folder, case):
    """Writes a broken file: (conversation of its one record, its images) by case."""
    page(0).save(folder / "ok.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "doc.pdf").write_bytes(b"%PDF-1.4")
    talk = conversation("<image>\nQ", "A")
    records = {
        "missing": (talk, "nowhere.png"),
        "truncated": (talk, "cut.png"),
        "pdf": (talk, "doc.pdf"),
        "more marks": (conversation("<image>\n<image>\nQ", "A"), "ok.png"),
        "fewer marks": (talk, ["ok.png", "ok.png"]),
        "no assistant": (talk[:1], "ok.png"),
        "no such image": (talk, 7),
        "no path": (talk, None),
        "role": ([*talk, {"from": "robot", "value": "x"}], "ok.png"),
        "too long": (conversation("<image>\nQ", "A" * 400), "ok.png"),
    }
    turns, image = records[case]
    talks = {"conversations": turns, "image": image}
    if case == "no path":
        item = {"type": "image", "image": {"url": "x"}}
        talks = {"messages": [{"role": "user", "content": [item]}, {"role": "assistant", "content": "A"}]}
    lines = [{"id": 1, "conversations": conversation("Q", "A")}, {"id": 2} | talks]
    (folder / "bad.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"no image file .*nowhere\.png"),
        ("truncated", r"cut\.png .*damaged"),
        ("pdf", r"doc\.pdf is a PDF, expected an image"),
        ("more marks", "2 <image> marks .* and 1 images"),
        ("fewer marks", "1 <image> marks .* and 2 images"),
        ("no assistant", "no turn of the assistant"),
        ("no such image", "image is 7, expected a path"),
        ("no path", "the image of an item is {'url': 'x'}, expected a path"),
        ("role", "robot"),
        ("too long", r"needs 4\d\d tokens and 64 patches, a row holds 300 and 192"),
    ],
)
def test_what_is_broken_is_said_with_its_line_and_id(experiment, tokenizer, folder, case, message):
    break_it(folder, case)
    with pytest.raises(DataError, match=message) as error:
        source = source_of(experiment, tokenizer, folder, "bad.jsonl")
        source.batch(0)
    assert "bad.jsonl line 2 (id 2)" in str(error.value)


def test_too_long_can_be_left_out(experiment, tokenizer, folder):
    break_it(folder, "too long")
    source = source_of(experiment, tokenizer, folder, "bad.jsonl", too_long="skip")
    assert source.streams[0].skipped == 1
    assert [len(source.row(row)) for row in range(2)] == [1, 1]
