"""Layers of several kinds: every layer once and in order, few to compile, and names that say their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from vishwamai.checkpoint.layers import stack, unstack
from vishwamai.models.config import TextConfig
from vishwamai.models.layers import parameter
from vishwamai.models.pattern import by_number, find_pattern, make_layers, one_by_one, run
from vishwamai.models.transformer import Transformer


@given(st.text("abc", min_size=1, max_size=14))
def test_every_layer_once_and_of_its_kind(kinds):
    stacks = find_pattern(kinds).stacks
    assert sorted(number for stack in stacks for number in stack.numbers) == list(range(len(kinds)))
    for part in stacks:
        assert len({kinds[number] for number in part.numbers}) == 1
        assert part.stacked or len(part.numbers) == 1
    assert len({stack.name for stack in stacks}) == len(stacks) <= len(kinds)


@pytest.mark.parametrize(
    "kinds, names",
    [
        ("aaaa", [""]),
        ("a", [""]),
        ("ab", ["0", "1"]),
        ("aaaaab" * 4 + "aa", ["0::6", "1::6", "2::6", "3::6", "4::6", "5::6", "24", "25"]),
        ("abbbbb", ["0", "1::1"]),
        ("xyababab", ["0", "1", "2::2", "3::2"]),
        ("abcab", ["0", "1", "2", "3", "4"]),
    ],
)
def test_names(kinds, names):
    assert [stack.name for stack in find_pattern(kinds).stacks] == names


class Letter(nnx.Module):
    """A layer that writes its kind into a number, digit by digit."""

    def __init__(self, kind, rngs):
        self.weight = parameter(rngs, (1,), ("norm",), lambda key, shape, dtype: jax.random.uniform(key, shape, dtype))
        self.kind = "abc".index(kind) + 1

    def __call__(self, x):
        return x * 10 + self.kind, (x, self.weight[...])


@pytest.mark.parametrize("kinds", ["aaaa", "abab", "abcabcab", "aabbbbb", "c", "ab", "abac"])
@pytest.mark.parametrize("checkpoint", [None, jax.checkpoint], ids=["plain", "remat"])
def test_layers_run_in_their_order(kinds, checkpoint):
    pattern, layers = find_pattern(kinds), make_layers(Letter, kinds, nnx.Rngs(0))
    x, found = run(layers, pattern, lambda layer, x: layer(x), jnp.int32(0), checkpoint)
    assert int(x) == int("".join(str("abc".index(kind) + 1) for kind in kinds))
    outputs = by_number(pattern, found)
    assert [int(before) for before, _ in outputs] == [int(str(int(x))[:i] or 0) for i in range(len(kinds))]
    alone = one_by_one(layers, pattern)
    assert [layer.kind for layer in alone] == ["abc".index(kind) + 1 for kind in kinds]
    weights = [float(weight[0]) for _, weight in outputs]
    assert weights == [float(layer.weight[0]) for layer in alone]
    assert len(set(weights)) == len(kinds), "each layer starts with numbers of its own"
    names = unstack(nnx.state({"layers": layers}))
    assert [float(names[f"layers.{i}.weight"][0]) for i in range(len(kinds))] == weights


def test_a_stack_on_disk_is_the_same_whatever_is_scanned():
    """One kind or a pattern: the arrays of a checkpoint have the same names, and go into either."""
    sizes = dict(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, sliding_window=3,
    )  # fmt: skip
    uniform, mixed = (
        nnx.state(Transformer(TextConfig(**sizes, layer_types=types), rngs=nnx.Rngs(0)))
        for types in (None, ("sliding_attention", "full_attention"))
    )
    arrays = unstack(uniform)
    assert arrays.keys() == unstack(mixed).keys()
    again = unstack(stack(arrays, mixed))
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
