import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsit_jax.evaluation.metrics import (
    METRICS,
    anls,
    character_error_rate,
    exact_match,
    levenshtein,
    mean,
    relaxed_accuracy,
)


def textbook_levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


short_text = st.text(alphabet="abcß İ\U0001f600", max_size=40)


@given(short_text, short_text)
def test_levenshtein_equals_the_textbook(a, b):
    assert levenshtein(a, b) == textbook_levenshtein(a, b)


def test_levenshtein_beyond_a_machine_word():
    rng = random.Random(0)
    a = "".join(rng.choices("abcd", k=300))
    b = "".join(rng.choices("abcd", k=257))
    assert levenshtein(a, b) == textbook_levenshtein(a, b)
    page = "".join(rng.choices("abcdefgh ", k=4000))
    assert levenshtein(page, page[:2000] + page[2010:]) == 10


@pytest.mark.parametrize(
    ("file", "source", "metric"),
    [("anls", "rrc_official", anls), ("relaxed_accuracy", "pix2struct", relaxed_accuracy)],
)
def test_equals_the_official_scorer_on_every_vector(shared, file, source, metric):
    lines = (shared / "metric_vectors" / f"{file}.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [row for row in map(json.loads, filter(None, lines)) if row["source"] == source]
    assert len(rows) > 90
    for row in rows:
        if row["score"] is None:  # the official scorer raised; ours must answer or say clearly why not
            with pytest.raises(ValueError):
                metric(row["prediction"], row["answers"])
        else:
            assert metric(row["prediction"], row["answers"]) == pytest.approx(row["score"], abs=1e-9), row


def test_corpus_anls_equals_the_official_script(shared):
    folder = shared / "metric_vectors" / "rrc_fixture"
    verdict = json.loads((folder / "verdicts.json").read_text())["good.json"]
    predictions = {row["questionId"]: row["answer"] for row in json.loads((folder / "good.json").read_text())}
    questions = json.loads((folder / "gt.json").read_text())["data"]
    scores = {q["questionId"]: anls(predictions[q["questionId"]], q["answers"]) for q in questions}
    assert {str(key): score for key, score in scores.items()} == pytest.approx(verdict["per_question"])
    assert mean(scores.values()) == pytest.approx(verdict["anls"], abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("", [""], 1.0),
        ("", ["paris"], 0.0),
        ("pariß", ["paris"], 5 / 6),  # upper case makes ß two letters long, and the length is taken there
        ("paris", ["pariß"], 5 / 6),
        ("fo", ["  foo  "], 6 / 7),
        ("  fo  ", ["foo"], 5 / 6),  # white space at the ends lengthens, though it costs no edit
        ("ab", ["abcd"], 0.5),  # the threshold itself is kept
        ("ab", ["abcde"], 0.0),
        ("İİ", ["x"], 0.0),  # lower case makes İ two letters: more edits than letters, never negative
        ("cat", ["dog", "CAT"], 1.0),
    ],
)
def test_anls_corner_cases(prediction, answers, expected):
    assert anls(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("105", "100", 1.0),
        ("105.01", "100", 0.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),
        ("5%%", "5%", 1.0),
        ("5% ", "5%", 0.0),
        ("%", "%", 1.0),
        ("inf", "inf", 0.0),
        ("nan", "nan", 0.0),
        ("1e308", "1e-308", 0.0),
        ("-100", "100", 0.0),
        ("\ud800", "5", 0.0),
        ("", "", 1.0),
    ],
)
def test_relaxed_accuracy_corner_cases(prediction, answer, expected):
    assert relaxed_accuracy(prediction, [answer]) == expected


def test_exact_match_ignores_case_and_white_space_only():
    assert exact_match(" 12 May\n2024", ["x", "12 may 2024"]) == 1.0
    assert exact_match("12 May, 2024", ["12 May 2024"]) == 0.0


def test_character_error_rate():
    assert character_error_rate("abc", "abcd") == 0.25
    assert character_error_rate("abcdefgh", "ab") == 3.0
    assert character_error_rate("ABC", "abc") == 1.0
    assert character_error_rate("", "") == 0.0
    assert character_error_rate("x", "") == 1.0
    assert METRICS["character_error_rate"].score("ab", ["abcd", "abc"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("metric", [anls, relaxed_accuracy, exact_match])
def test_answers_must_be_a_non_empty_sequence_of_strings(metric):
    with pytest.raises(ValueError, match="at least one accepted answer"):
        metric("x", [])
    with pytest.raises(TypeError, match="not the string 'abc'"):
        metric("x", "abc")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.randoms())
def test_mean_does_not_depend_on_the_order(values, rng):
    shuffled = list(values)
    rng.shuffle(shuffled)
    assert mean(values) == mean(shuffled)


def test_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        mean([])
