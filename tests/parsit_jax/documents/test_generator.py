"""The generator's promises: what pages hold, what training never sees, and that nothing can be guessed."""

import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest

from parsit_jax.documents.generator import (
    ALPHABET,
    FONTS,
    KINDS,
    Document,
    Split,
    fonts_of,
    generate,
    layouts_of,
)
from parsit_jax.evaluation.metrics import anls

ASKED = tuple(kind for kind in KINDS if kind not in ("plain_lines", "lines", "notes", "primer"))


@cache
def documents(kind: str, split: Split, count: int = 150) -> tuple[Document, ...]:
    return tuple(generate(kind, seed, split) for seed in range(count))


def fingerprint(document: Document) -> int:
    told = repr((document.transcription, document.questions, document.layout, document.font))
    return zlib.crc32(document.image.tobytes(), zlib.crc32(told.encode()))


# ------------------------------------------------------------------------------------------- determinism


def test_same_document_in_another_process_and_no_jax():
    code = (
        "import sys, zlib\n"
        "from parsit_jax.documents.generator import KINDS, Split, generate\n"
        "for kind in KINDS:\n"
        "    for split in Split:\n"
        "        d = generate(kind, 5, split)\n"
        "        told = repr((d.transcription, d.questions, d.layout, d.font))\n"
        "        print(zlib.crc32(d.image.tobytes(), zlib.crc32(told.encode())))\n"
        "heavy = {'jax', 'matplotlib', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    ).stdout
    here = [fingerprint(generate(kind, 5, split)) for kind in KINDS for split in Split]
    assert [int(line) for line in printed.split()] == here


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_or_split_is_another_document(kind):
    prints = {fingerprint(document) for split in Split for document in documents(kind, split)}
    assert len(prints) == 300


# ------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("kind", ASKED)
def test_held_out_answers_never_appear_in_training(kind):
    trained = {question.answer.lower() for d in documents(kind, Split.TRAIN, 600) for question in d.questions}
    held_out = {question.answer.lower() for d in documents(kind, Split.HELD_OUT) for question in d.questions}
    assert len(trained) > 1000 and len(held_out) > 300
    assert not trained & held_out


def test_amounts_are_held_out_in_every_notation():
    def digits(split: Split, count: int) -> set[str]:
        asked = (q for d in documents("receipts", split, count) for q in d.questions)
        return {"".join(filter(str.isdigit, q.answer)) for q in asked if q.field in ("total", "item", "tax", "cash")}

    assert not digits(Split.TRAIN, 600) & digits(Split.HELD_OUT, 150)


@pytest.mark.parametrize("kind", ASKED)
def test_held_out_layouts_and_fonts_are_never_trained_on(kind):
    trained, held_out = documents(kind, Split.TRAIN), documents(kind, Split.HELD_OUT)
    assert {d.layout for d in trained} == set(layouts_of(kind, Split.TRAIN))
    assert {d.layout for d in held_out} == set(layouts_of(kind, Split.HELD_OUT))
    assert not {d.layout for d in trained} & {d.layout for d in held_out}
    assert {d.font for d in trained} == set(fonts_of(Split.TRAIN))
    assert {d.font for d in held_out} == set(fonts_of(Split.HELD_OUT))
    assert not {d.font for d in trained} & {d.font for d in held_out}


def test_held_out_fonts_are_of_other_families():
    families = {split: {name.split("-")[0] for name in fonts_of(split)} for split in Split}
    assert len(fonts_of(Split.TRAIN)) >= 8 and len(families[Split.HELD_OUT]) >= 2
    assert not families[Split.TRAIN] & families[Split.HELD_OUT]
    assert len(layouts_of("receipts", Split.TRAIN)) >= 4


@pytest.mark.parametrize(("split", "above"), [(Split.TRAIN, False), (Split.HELD_OUT, True)])
def test_only_held_out_receipts_print_the_total_above_the_items(split, above):
    for document in documents("receipts", split):
        lines = [f" {line} " for line in document.transcription.split("\n")]
        at = {
            name: next(i for i, line in enumerate(lines) if f" {text} " in line)
            for name, text in document.fields.items()
        }
        items = [place for name, place in at.items() if name.startswith("item ")]
        assert items and all(place > at["total"] if above else place < at["total"] for place in items)


def test_seen_layout_and_font_with_unseen_values():
    document = generate("receipts", 3, Split.HELD_OUT, layout="colon", font="Roboto-Regular")
    assert (document.layout, document.font) == ("colon", "Roboto-Regular")
    total = document.fields["total"]
    assert f": {total}" in document.transcription
    assert total not in {d.fields["total"] for d in documents("receipts", Split.TRAIN)}


# ------------------------------------------------------------------------------------------- what pages hold


@pytest.mark.parametrize("split", Split)
def test_receipts_hold_at_least_what_the_benchmark_asks(split):
    for document in documents("receipts", split):
        assert 6 <= len(document.transcription.split("\n")) <= 9
        assert len(document.fields) >= 4
        assert {"shop", "date", "number", "total"} <= set(document.fields)
        money = [value for name, value in document.fields.items() if name not in ("shop", "date", "number")]
        assert len(set(money)) == len(money) >= 3  # so exactly one is the total


def test_receipt_sums_add_up():
    for document in documents("receipts", Split.TRAIN):
        cents = {
            name: int("".join(filter(str.isdigit, text)))
            for name, text in document.fields.items()
            if name not in ("shop", "date", "number")
        }
        goods = sum(amount for name, amount in cents.items() if name.startswith("item "))
        assert goods + cents.get("tax", 0) == cents["total"]
        assert cents.get("subtotal", goods) == goods
        assert cents.get("cash", cents["total"]) - cents.get("change", 0) == cents["total"]


def test_the_total_is_neither_always_last_nor_always_largest():
    last = largest = 0
    for document in documents("receipts", Split.TRAIN):
        total = document.fields["total"]
        money = [text for name, text in document.fields.items() if name not in ("shop", "date", "number")]
        places = {text: document.transcription.rfind(text) for text in money}
        last += max(places, key=places.get) == total
        largest += max(money, key=lambda text: int("".join(filter(str.isdigit, text)))) == total
    assert 0.2 < last / 150 < 0.8
    assert 0.2 < largest / 150 < 0.8


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("split", Split)
def test_answers_are_printed_and_questions_are_unambiguous(kind, split):
    for document in documents(kind, split):
        assert len(document.questions) >= 2
        texts = [question.text for question in document.questions]
        assert len(set(texts)) == len(texts)
        lines = [f" {line} " for line in document.transcription.split("\n")]
        for question in document.questions:
            assert any(f" {question.answer} " in line for line in lines), (question, document.transcription)
        assert sorted(document.fields.values()) == sorted(question.answer for question in document.questions)


def test_alphabet_is_closed_and_lines_teach_all_of_it():
    printed = Counter()
    for kind in KINDS:
        for split in Split:
            for document in documents(kind, split):
                printed.update(document.transcription.replace("\n", ""))
                for question in document.questions:
                    printed.update(question.text)
    assert set(printed) <= set(ALPHABET) and len(ALPHABET) == len(set(ALPHABET))
    taught = set("".join(d.transcription for d in documents("notes", Split.TRAIN, 600)))
    assert set(ALPHABET) <= taught


def test_lines_are_one_to_three_and_notes_a_page():
    for kind, fewest, most in (("lines", 1, 3), ("notes", 5, 9)):
        counts = Counter(len(d.transcription.split("\n")) for d in documents(kind, Split.TRAIN))
        assert set(counts) == set(range(fewest, most + 1))


# ------------------------------------------------------------------------------------------- nothing to guess


@pytest.mark.parametrize("kind", ASKED)
def test_the_likeliest_answer_of_each_field_scores_low(kind):
    """What a reader of blank pages can do at best: per field, the answer that scores highest in training."""
    trained = defaultdict(list)
    for document in documents(kind, Split.TRAIN):
        for question in document.questions:
            trained[question.field].append(question.answer)
    guesses = {
        field: max(answers[:80], key=lambda guess: sum(anls(guess, [answer]) for answer in answers[:150]))
        for field, answers in trained.items()
    }
    asked = [question for document in documents(kind, Split.HELD_OUT) for question in document.questions]
    assert len(asked) >= 300
    assert np.mean([anls(guesses[question.field], [question.answer]) for question in asked]) < 0.2


# ------------------------------------------------------------------------------------------- the images


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_legible_grey_pages(kind):
    for document in documents(kind, Split.TRAIN):
        assert document.image.mode == "L" and document.image.size == (128, 128)
        pixels = np.asarray(document.image, np.int32)
        darkest = np.sort(pixels, axis=None)[: 1 if kind == "primer" else 20]  # a primer may hold a dot alone
        assert np.median(pixels) - darkest.mean() > 80


def test_letters_grow_with_the_page():
    small = generate("receipts", 1, Split.TRAIN, layout="ledger", font="DejaVuSans")
    large = generate("receipts", 1, Split.TRAIN, (256, 256), layout="ledger", font="DejaVuSans")
    assert large.image.size == (256, 256)

    def inked_rows(document: Document) -> int:
        pixels = np.asarray(document.image, np.int32)
        return int(((np.median(pixels) - pixels) > 60).any(axis=1).sum())

    assert inked_rows(large) > 1.5 * inked_rows(small)


def test_lines_fit_a_strip():
    assert generate("lines", 0, Split.TRAIN, (48, 128)).image.size == (128, 48)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("receipt", 0, Split.TRAIN), {}, "unknown kind of document 'receipt'.*receipts"),
        (("receipts", -1, Split.TRAIN), {}, "seed -1"),
        (("receipts", 0, Split.TRAIN), {"layout": "round"}, "unknown layout 'round'.*ledger"),
        (("receipts", 0, Split.TRAIN), {"font": "Comic"}, "unknown font 'Comic'.*Roboto-Regular"),
        (("receipts", 0, Split.TRAIN, (32, 32)), {}, "do not fit a page of 32 x 32"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*arguments, **options)


def test_a_missing_font_package_is_named(monkeypatch):
    from parsit_jax.documents.generator import fonts

    monkeypatch.setattr(fonts.importlib.util, "find_spec", lambda name: None)
    fonts.font_path.cache_clear()
    with pytest.raises(FileNotFoundError, match="pip install font-lato"):
        fonts.font_path("Lato-Regular")
    assert set(FONTS) >= {"Lato-Regular"}
