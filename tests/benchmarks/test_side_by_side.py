"""What the benchmarks share."""

import pytest

from benchmarks.side_by_side import in_turns, markdown, spread


def test_calls_take_turns():
    calls = []
    first, second = in_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3, pause=0)
    assert "".join(calls) == "ababab"
    assert len(first) == len(second) == 3 and min(first + second) >= 0


def test_spread_is_median_lowest_highest():
    assert spread([3.0, 1.0, 2.04]) == "2.04 (1.00-3.00)"
    assert spread([8404.4, 7618, 9554], digits=0) == "8,404 (7,618-9,554)"


def test_a_markdown_table():
    assert (
        markdown(("", "ms"), [("ours", "1"), ("theirs", "2")])
        == "|  | ms |\n| --- | --- |\n| ours | 1 |\n| theirs | 2 |"
    )
    with pytest.raises(ValueError, match="found 1 cells, expected 2"):
        markdown(("", "ms"), [("ours",)])
