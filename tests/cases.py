"""Parameters of tests that are named in a dict."""

from collections.abc import Collection, Mapping

import pytest


def quick_and_slow(cases: Mapping[str, object], quick: Collection[str]) -> list:
    """Every case by its name; those that are not `quick` are among the slow tests. A tuple is several arguments.

    Raises KeyError: a quick case that is none of them.
    """
    for name in quick:
        cases[name]
    values = {name: case if isinstance(case, tuple) else (case,) for name, case in cases.items()}
    slow = [pytest.mark.slow]
    return [pytest.param(*value, id=name, marks=() if name in quick else slow) for name, value in values.items()]
