"""Random values for documents: amounts, dates, numbers, names. Held-out ones never appear in training.

Every value has a key (an amount's cents, a date's day, a name in lower case). The key's hash says to which
split the value belongs: a tenth is held out, whatever format or capitals it is printed in.
"""

import math
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from parsit_jax.documents.generator.document import Split
from parsit_jax.documents.generator.words import ADJECTIVES, MONTHS, NOUNS, SUFFIXES, SYLLABLES

ALPHABET = string.digits + string.ascii_letters + string.punctuation + " £€"
"""Every character that a generated page can show."""

_HELD_OUT_ONE_IN = 10

T = TypeVar("T")


def in_split(key: str, split: Split) -> bool:
    """Whether the value with this key may appear in documents of `split`."""
    held_out = zlib.crc32(key.encode()) % _HELD_OUT_ONE_IN == 0
    return held_out == (split is Split.HELD_OUT)


@dataclass(frozen=True)
class Source:
    """Random choices for one document of one split."""

    rng: np.random.Generator
    split: Split

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def keep(self, draw: Callable[[], T], key: Callable[[T], str]) -> T:
        """Draws until the value belongs to this split."""
        while not in_split(key(value := draw()), self.split):
            pass
        return value


# ------------------------------------------------------------------------------------------- money


def cents(source: Source, low: int = 50, high: int = 999_999) -> int:
    """An amount in cents, log-uniform: as many between 1 and 10 as between 100 and 1,000."""
    log_low, log_high = math.log(low), math.log(high + 1)
    return source.keep(lambda: min(high, int(math.exp(source.uniform(log_low, log_high)))), str)


_TRIES = 1000


def cents_pair(source: Source, total: int, low: int) -> tuple[int, int] | None:
    """Two amounts of this split, each at least `low`, that add up to `total`; None if chance finds none."""
    if total < 2 * low:
        return None
    for _ in range(_TRIES):
        first = source.integer(low, total - low)
        if in_split(str(first), source.split) and in_split(str(total - first), source.split):
            return first, total - first
    return None


def cents_parts(source: Source, total: int, count: int) -> list[int] | None:
    """`count` amounts of this split that add up to `total`, itself one; None if chance finds none."""
    parts = []
    for remaining in range(count, 1, -1):
        pair = cents_pair(source, total, max(30, total // (3 * remaining)))
        if pair is None:
            return None
        parts.append(pair[0])
        total = pair[1]
    return [*parts, total]


def cents_beyond(source: Source, total: int, low: int, high: int) -> int | None:
    """An amount of this split that makes another with `total` added, as change makes cash; None if none."""
    for _ in range(_TRIES):
        if in_split(str(total + (amount := cents(source, low, high))), source.split):
            return amount
    return None


@dataclass(frozen=True)
class Money:
    """How one document prints amounts."""

    prefix: str
    suffix: str
    thousands: str
    decimal: str

    def __call__(self, amount: int) -> str:
        whole = f"{amount // 100:,}".replace(",", self.thousands)
        return f"{self.prefix}{whole}{self.decimal}{amount % 100:02d}{self.suffix}"


def quantity_style(source: Source) -> Callable[[int], str]:
    """A way of printing the numbers of a table or a chart: 48213, 48,213, 4821.3 or 482.13."""
    return source.pick((str, lambda n: f"{n:,}", lambda n: f"{n / 10:.1f}", lambda n: f"{n / 100:.2f}"))


def money_style(source: Source) -> Money:
    """A way of printing amounts: sign before, behind or absent; 1,204.50, 1204.50 or 1.204,50."""
    thousands, decimal = source.pick(((",", "."), (",", "."), ("", "."), (".", ",")))
    sign = source.pick(("", "", "$", "£", "€"))
    if decimal == ",":
        return Money("", "€", thousands, decimal) if source.chance(0.5) else Money("", "", thousands, decimal)
    return Money(sign, "", thousands, decimal)


# ------------------------------------------------------------------------------------------- dates

Day = tuple[int, int, int]
"""Year, month, day of the month."""

DATE_FORMATS: tuple[Callable[[int, int, int], str], ...] = (
    lambda y, m, d: f"{d:02d}/{m:02d}/{y}",
    lambda y, m, d: f"{m:02d}/{d:02d}/{y}",
    lambda y, m, d: f"{d:02d}.{m:02d}.{y}",
    lambda y, m, d: f"{y}-{m:02d}-{d:02d}",
    lambda y, m, d: f"{y}/{m:02d}/{d:02d}",
    lambda y, m, d: f"{d:02d}/{m:02d}/{y % 100:02d}",
    lambda y, m, d: f"{d} {MONTHS[m - 1]} {y}",
    lambda y, m, d: f"{MONTHS[m - 1]} {d}, {y}",
    lambda y, m, d: f"{d:02d}-{MONTHS[m - 1]}-{y % 100:02d}",
)


def day_key(day: Day) -> str:
    """One key for both readings of 03/04/2021, so that training prints no held-out date the other way."""
    year, month, day_of_month = day
    return f"{year % 100}:{min(month, day_of_month)}:{max(month, day_of_month)}"


_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def day(source: Source) -> Day:
    """A day from 1970 to 2034."""

    def draw() -> Day:
        month = source.integer(1, 12)
        return source.integer(1970, 2034), month, source.integer(1, _DAYS[month - 1])

    return source.keep(draw, day_key)


def date_style(source: Source) -> Callable[[Day], str]:
    """A date format, for all dates of one document."""
    date_format = source.pick(DATE_FORMATS)
    return lambda value: date_format(*value)


# ------------------------------------------------------------------------------------------- numbers, names


_PREFIX_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # without I, O and Q, which pass for 1 and 0


def number(source: Source) -> str:
    """A document's number: five to seven digits, or four to six behind one or two letters."""

    def draw() -> str:
        if source.chance(0.5):
            digits = source.integer(5, 7)
            return str(source.integer(10 ** (digits - 1), 10**digits - 1))
        letters = "".join(source.pick(_PREFIX_LETTERS) for _ in range(source.integer(1, 2)))
        digits = source.integer(4, 6)
        return f"{letters}{source.pick(('', '-'))}{source.integer(10 ** (digits - 1), 10**digits - 1)}"

    return source.keep(draw, lambda text: text)


def invented(source: Source, syllables: int) -> str:
    """A made-up word such as Maroli."""
    return "".join(source.pick(SYLLABLES) for _ in range(syllables)).capitalize()


def company(source: Source) -> str:
    """The name of a shop or company, at most 16 characters."""

    def draw() -> str:
        form = source.integer(0, 3)
        if form == 0:
            return f"{invented(source, 2)} {source.pick(SUFFIXES)}"
        if form == 1:
            return f"{invented(source, 2)} & {invented(source, 2)}"
        if form == 2:
            return f"{source.pick(ADJECTIVES)} {source.pick(NOUNS)} {source.pick(SUFFIXES)}"
        return invented(source, 3)

    def short() -> str:
        while len(name := draw()) > 16:
            pass
        return name

    return source.keep(short, str.lower)


def person(source: Source) -> str:
    """A first and a last name, at most 14 characters."""

    def draw() -> str:
        while len(name := f"{invented(source, 2)} {invented(source, 2)}") > 14:
            pass
        return name

    return source.keep(draw, str.lower)


def place(source: Source) -> str:
    """A made-up town."""
    return source.keep(lambda: invented(source, 3), str.lower)


def phone(source: Source) -> str:
    """A telephone number of nine digits."""

    def draw() -> str:
        return f"0{source.integer(10, 99)} {source.integer(100, 999)} {source.integer(100, 999)}"

    return source.keep(draw, lambda text: text)


def item(source: Source, longest: int = 10) -> str:
    """The name of something sold, at most `longest` characters."""

    def draw() -> str:
        form = source.integer(0, 2)
        if form == 0:
            return source.pick(NOUNS)
        if form == 1:
            return f"{source.pick(ADJECTIVES)} {source.pick(NOUNS)}"
        return f"{source.pick(NOUNS)} {source.integer(2, 99)}{source.pick(('g', 'kg', 'ml', 'cm', ''))}"

    def short() -> str:
        while len(name := draw()) > longest:
            pass
        return name

    return source.keep(short, str.lower)


def items(source: Source, count: int, longest: int = 10) -> tuple[str, ...]:
    """`count` items, no two with the same noun, so that a question about one means one line."""
    chosen: dict[str, str] = {}
    while len(chosen) < count:
        name = item(source, longest)
        noun = next(word for word in name.split() if word in NOUNS)
        chosen.setdefault(noun, name)
    return tuple(chosen.values())


def random_string(source: Source) -> str:
    """Two to eight characters of the alphabet, letters and digits more often than signs."""
    letters = string.ascii_letters
    pools = (ALPHABET.replace(" ", ""), string.digits, letters, letters + string.digits)

    def draw() -> str:
        pool = source.pick(pools)
        return "".join(source.pick(pool) for _ in range(source.integer(2, 8)))

    return source.keep(draw, lambda text: text)
