"""The comparison on a GPU, as far as a CPU can go: the same cases, small, with XLA in cuDNN's place."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import Case, Measured, Sizes, cases, gpu, measure, table

SMALL = Sizes(lengths=(32, 64), heads=4, kv_heads=2, width=16, experts=(3, 24, 16, 8), cache=(2, 48))


def test_every_case_runs_and_agrees_with_its_peer():
    found = [measure(case, rounds=2) for case in cases(SMALL, peer="xla", backends=("auto", "xla"))]
    assert [one for one in found if isinstance(one, str)] == []
    names = [one.case.name for one in found]
    assert len(set(names)) == len(names) == 2 * 2 * 2 + 5 * 2 + 2 + 1
    assert all(len(one.ours) == len(one.peer) == 2 and min(one.ours + one.peer) > 0 for one in found)
    lines = table(found).splitlines()
    assert len(lines) == len(found) + 2
    assert lines[2].startswith("| causal 32, forward, auto | ") and lines[2].endswith(" | 1.11 |")
    assert lines[3].endswith(" | 1.11 |") and lines[4].endswith(" | - |")
    assert sum(line.endswith(" | 1.20 |") for line in lines) == 10


def test_the_table_by_hand():
    case = Case("toy", print, print, (), aim=1.2)
    one = Measured(case, ours=[0.002, 0.001, 0.004], peer=[0.001, 0.001, 0.001])
    assert table([one]).splitlines()[2] == ("| toy | 2.000 (1.000-4.000) | 1.000 (1.000-1.000) | 2.00 | 1.20 |")


def test_what_is_not_the_same_or_does_not_run_is_said():
    ones = (jnp.ones(8),)
    assert "differ by 1.0e+00 of their norm" in measure(Case("twice", lambda x: 2 * x, lambda x: x, ones), 1)
    twice = lambda x: 2 * x  # noqa: E731
    assert isinstance(measure(Case("twice", twice, lambda x: x, ones, exact=lambda x: x + x), 1), Measured)
    assert "differ by 1.0e+00" in measure(Case("twice", twice, twice, ones, exact=lambda x: x), 1)
    assert "nan" in measure(Case("nan", lambda x: x * jnp.nan, lambda x: x, ones), 1)
    assert measure(Case("bad", lambda x: x @ jnp.ones((3, 3)), lambda x: x, ones), 1).startswith("TypeError: ")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_it_says_what_was_found_and_what_to_do(monkeypatch):
    with pytest.raises(SystemExit, match=r"found cpu .*expected a GPU: .*pip install '\.\[cuda\]'"):
        gpu()
    monkeypatch.setattr("sys.argv", ["gpu_kernels"])
    with pytest.raises(SystemExit, match="expected a GPU"):
        gpu_kernels.main()
