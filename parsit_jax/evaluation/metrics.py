"""Scores of one predicted string: ANLS, relaxed accuracy, exact match and character error rate.

The published scorers are followed to the letter, quirks included, so that numbers can be laid beside the
literature. None of these functions strips the prediction: whoever turns model output into predictions does
that once (`run.py`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def levenshtein(a: str, b: str) -> int:
    """Least number of single-character insertions, deletions and substitutions that turn `a` into `b`.

    Myers' bit-vector algorithm (J. ACM 46(3), 1999) in Hyyrö's form (2003): a column of the dynamic program
    lives in one Python integer, so two pages of 4,000 characters take milliseconds.
    """
    if not a:
        return len(b)
    positions: dict[str, int] = {}
    for i, character in enumerate(a):
        positions[character] = positions.get(character, 0) | 1 << i
    all_rows = (1 << len(a)) - 1
    last_row = 1 << len(a) - 1
    # Bit i of `increase` / `decrease`: the column's value rises / falls by one from row i - 1 to row i.
    increase, decrease, distance = all_rows, 0, len(a)
    for character in b:
        equal = positions.get(character, 0)
        vertical = equal | decrease
        diagonal = (((equal & increase) + increase) ^ increase) | equal
        right_increase = decrease | ~(diagonal | increase) & all_rows
        right_decrease = increase & diagonal
        distance += bool(right_increase & last_row) - bool(right_decrease & last_row)
        right_increase = right_increase << 1 | 1
        right_decrease <<= 1
        increase = (right_decrease | ~(vertical | right_increase)) & all_rows
        decrease = right_increase & vertical
    return distance


def normalise(text: str) -> str:
    """Lower case, with every run of white space made one blank and none at the ends."""
    return " ".join(text.lower().split())


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest answer, in [0, 1]; below one half it counts as 0.

    Averaged over questions this is ANLS (Biten et al., 2019, equation 1), as the Robust Reading Competition's
    script for DocVQA and InfographicVQA computes it: the distance is taken between normalised strings, but
    divided by the longer of the two strings as they came, in upper case (so padding, and letters such as ß,
    count).

    Raises:
        ValueError: `answers` is empty.
    """
    _require_answers(answers)
    similarity = max(_similarity(prediction, answer) for answer in answers)
    return 0.0 if similarity < ANLS_THRESHOLD else similarity


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if some answer is matched: a number within 5 % of it, anything else exactly but for case; else 0.0.

    ChartQA's measure (Masry et al., 2022, section 5.1) as Pix2Struct computes it: a number is whatever
    `float` takes, where "12%" is 0.12. An answer of zero, which no relative tolerance fits, is compared as a
    string ("0.0" does not match "0").

    Raises:
        ValueError: `answers` is empty.
    """
    _require_answers(answers)
    return float(any(_relaxed_match(prediction, answer) for answer in answers))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals some answer, but for case and the amount of white space; else 0.0.

    Raises:
        ValueError: `answers` is empty.
    """
    _require_answers(answers)
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def character_error_rate(prediction: str, reference: str) -> float:
    """Edits that turn the prediction into the reference, per character of the reference; may exceed 1.

    Characters are compared as they are. With an empty reference the rate is 0.0 for an empty prediction and
    1.0 for any other.
    """
    if not reference:
        return float(bool(prediction))
    return levenshtein(prediction, reference) / len(reference)


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean, the same to the last bit in whatever order the values come.

    Raises:
        ValueError: there are no values.
    """
    values = list(values)
    if not values:
        raise ValueError("the mean of no values is undefined: check that the benchmark has examples")
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Metric:
    """A named score of one prediction against the accepted answers."""

    title: str
    score: Callable[[str, Sequence[str]], float]
    higher_is_better: bool = True


METRICS = {
    "anls": Metric("ANLS", anls),
    "exact_match": Metric("exact match", exact_match),
    "relaxed_accuracy": Metric("relaxed accuracy", relaxed_accuracy),
    "character_error_rate": Metric(
        "CER",
        lambda prediction, answers: min(character_error_rate(prediction, answer) for answer in answers),
        higher_is_better=False,
    ),
}


def _require_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str):
        raise TypeError(f"answers must be a sequence of strings, not the string {answers!r}: pass [{answers!r}]")
    if not len(answers):
        raise ValueError("a question needs at least one accepted answer, and none was given")


def _similarity(prediction: str, answer: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    return 1.0 - levenshtein(normalise(answer), normalise(prediction)) / length if length else 1.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed_match(prediction: str, answer: str) -> bool:
    predicted, expected = _number(prediction), _number(answer)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()
