"""A run of benchmarks.tpu_static without a compiler: what is kept, what is measured again, what is printed."""

import json
import pickle
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest

from benchmarks.tpu_static import __main__ as command
from benchmarks.tpu_static import results
from benchmarks.tpu_static.cases import AIMS, CASES, Case
from benchmarks.tpu_static.measure import Measured, without
from benchmarks.tpu_static.results import Compared, Key, Results, compared, sources, state, tables
from benchmarks.tpu_static.shapes import ATTENTION, DECODE, EXPERTS

CASE = CASES[0]
JAX_SPLASH = CASE.public[0].name


def measured(milliseconds, memory=0.0):
    return Measured(milliseconds, milliseconds, 0.5, memory, 1234, 0, 3.0, ())


def test_every_case_is_named_once_and_has_its_peers():
    assert len({case.name for case in CASES}) == len(CASES) == 2 * len(ATTENTION) + 3 * len(EXPERTS) + len(DECODE)
    assert AIMS.keys() <= {case.name for case in CASES}
    for case in CASES:
        names = [candidate.name for candidate in (*case.public, case.ours)]
        assert len(set(names)) == len(names), case.name
        assert (len(names) > 4) == (not case.name.startswith("decode")), case.name
        for candidate in (*case.public, case.ours):  # they travel to a chip's process
            assert pickle.loads(pickle.dumps(candidate)) == candidate


def test_the_tables_by_hand():
    cases = (Case("one", (), CASE.ours, 0.9), Case("two", (), CASE.ours, None))
    found = {
        ("one", "v5e"): compared(CASE, {"a": measured(3.0), "b": measured(2.0), "c": "no room", "ours": measured(1.5)}),
        ("one", "v6e"): compared(CASE, {"a": measured(2.0, memory=2.0), "ours": measured(2.0, memory=2.0)}),
        ("two", "v5e"): compared(CASE, {"a": measured(3.0), "ours": "no room"}),
        ("two", "v6e"): compared(CASE, {"ours": measured(1.5, memory=1.0)}),
    }
    assert found["one", "v5e"] == Compared(measured(1.5), "b", measured(2.0))
    ours, public, bounds = tables(cases, ("v5e", "v6e"), found).split("\n\n")
    assert ours.splitlines() == [
        "| ours, ms (of the best public one's) | aim | v5e | v6e |",
        "| --- | --- | --- | --- |",
        "| one | 0.90 | 1.500 (0.75) | 2.000 (1.00), by HBM |",
        "| two | - | - | 1.500 (1.50 of HBM's) |",
    ]
    assert public.splitlines()[2:] == ["| one | 2.000 b | 2.000 a |", "| two | 3.000 a | - |"]
    assert bounds.splitlines()[2:] == [
        "| one | 0.500, -; 1,234 | 0.500, 2.000; 1,234 |",
        "| two | - | 0.500, 1.000; 1,234 |",
    ]


def test_what_is_kept_is_found_again(tmp_path):
    path, keys = tmp_path / "static.jsonl", [Key("case", "v5e", name, "0") for name in "ab"]
    for key, found in zip(keys, (measured(1.5), "no room"), strict=True):
        Results(path).add(key, found)
    again = Results(path)
    assert again.get(keys[0]).milliseconds == 1.5
    assert again.get(keys[1]) == "no room"
    assert again.get(keys[0]._replace(state="1")) is None
    assert Results(None).get(keys[0]) is None
    path.write_text(path.read_text() + '{"case": "cut o')
    with pytest.raises(SystemExit, match="line 3, is no measurement .*delete it"):
        Results(path)


@pytest.fixture
def installed(monkeypatch):
    """Every package, libtpu too, in one version, which the test may change."""
    version = {"": "1.0"}
    monkeypatch.setattr(results.importlib.metadata, "version", lambda name: version[""])
    return version


def test_a_state_follows_settings_versions_and_sources(monkeypatch, tmp_path, installed):
    ours, theirs = CASE.ours, CASE.public[0]
    before = state(ours), state(theirs)
    assert before == (state(ours), state(theirs)) and before[0] != before[1]
    assert state(replace(ours, shape=replace(ours.shape, T=128))) != before[0]
    kernel = next(path for path in sources("kernels.attention") if path.name == "forward.py")
    changed = tmp_path / "forward.py"
    changed.write_text(kernel.read_text() + "#")
    with monkeypatch.context() as patched:
        patched.setattr(results, "sources", lambda name: [changed if p == kernel else p for p in sources(name)])
        assert state(ours) != before[0]
        assert state(theirs) == before[1]
    installed[""] = "1.1"
    assert state(ours) != before[0] and state(theirs) != before[1]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, installed):
    """Runs the command for one case on two chips; what it printed, which candidates were compiled, the file."""

    def go(*options, answer=lambda candidate: measured(1.0 if candidate.name == "ours" else 2.0)):
        asked, path = [], tmp_path / "static.jsonl"
        monkeypatch.setattr(command.Chip, "measure", lambda chip, one: asked.append(one.name) or answer(one))
        fixed = ["tpu_static", "--cases", "qwen3-4k forward", "--chips", "v5e", "v6e", "--results", str(path)]
        monkeypatch.setattr("sys.argv", [*fixed, *options])
        command.main()
        return capsys.readouterr().out, sorted(asked), path

    return go


def test_a_run_goes_on_where_it_was_stopped(run):
    out, asked, path = run("--minutes", "0")
    assert asked == [] and "| qwen3-4k forward | 1.00 | - | - |" in out
    out, asked, path = run("--kernels", "^ours|^jax")
    assert asked == sorted(["ours", JAX_SPLASH] * 2)
    assert "| qwen3-4k forward | 1.00 | 1.000 (0.50) | 1.000 (0.50) |" in out
    assert "v6e qwen3-4k forward, ours: 1.000 ms" in out
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((line["chip"], line["kernel"]) for line in lines) == sorted(
        (chip, name) for chip in ("v5e", "v6e") for name in set(asked)
    )
    here = [one.name for one in CASE.public[1:] if not one.missing()]
    out, asked, path = run()
    assert asked == sorted(here * 2) and "| 1.000 (0.50) |" in out
    assert run()[1] == []


def test_a_compiler_that_died_is_asked_again_and_one_that_refused_is_not(run):
    def dies(candidate):
        raise BrokenProcessPool

    out, asked, path = run("--kernels", "^ours", answer=dies)
    assert "v5e qwen3-4k forward, ours: the compiler's process died" in out and not path.exists()
    out, asked, path = run("--kernels", "^ours", answer=lambda candidate: "CompileError: vmem")
    assert asked == ["ours", "ours"] and "v5e qwen3-4k forward, ours: CompileError: vmem" in out
    assert run("--kernels", "^ours")[1] == []


def test_a_peer_that_is_not_here_is_said_and_left_out(run, monkeypatch):
    monkeypatch.setattr(type(CASE.public[0]), "missing", lambda self: without("no_such_package"))
    out, asked, _ = run()
    assert out.startswith("not compared with: no_such_package can't be imported (No module named 'no_such_package')")
    assert set(asked) == {"ours"}


def test_an_unknown_case_names_those_there_are(run, capsys):
    with pytest.raises(SystemExit):
        run("--cases", "nothing")
    assert "no case matches 'nothing'; there are: qwen3-4k forward, " in capsys.readouterr().err
