"""Where an answer ends."""

import numpy as np
import pytest

from vishwamai.generation.stopping import length_with, parsed


def letters(tokens):
    return "".join(chr(token) for token in tokens)


@pytest.mark.parametrize("checked", range(4))
def test_the_shortest_answer_that_holds_the_string(checked):
    tokens = np.array([ord(letter) for letter in "abcdcd"])
    assert length_with(tokens, ["cd"], letters, checked) == 4
    assert length_with(tokens, ["x", "dcd", "bcd"], letters, checked) == 4
    assert length_with(tokens, ["x", "dc"], letters, checked) == 5
    assert length_with(tokens, ["x", "ca"], letters, checked) is None


def test_a_string_that_the_next_token_completes():
    tokens = np.array([ord(letter) for letter in "abcd"])
    assert length_with(tokens, ["d"], letters, 3) == 4


def test_what_ends_an_answer():
    assert parsed(None, [3, 4]) == ([3, 4], [])
    assert parsed([], [3, 4]) == ([], [])
    assert parsed("###", [3]) == ([], ["###"])
    assert parsed([7, "a", np.int32(8), "b"], [3]) == ([7, 8], ["a", "b"])
    for wrong in ([True], [""], [1.5], [None]):
        with pytest.raises(ValueError, match="expected token ids and strings"):
            parsed(wrong, [])
