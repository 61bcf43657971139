"""The loop: interrupted however it may be, a run's losses are those of a run that never was, bit for bit."""

import json
import os
import signal
import struct
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from tensorboardX.proto.event_pb2 import Event

from vishwamai import checkpoint
from vishwamai.checkpoint import CheckpointError, Checkpoints
from vishwamai.training import loop
from vishwamai.training.diagnose import NonFiniteGradients, explain
from vishwamai.training.metrics import MetricsWriter, cut_back
from vishwamai.training.throughput import flops_per_step

SECTIONS = {"training": {"steps": 9}, "checkpoint": {"every": 4}}


class Unplugged(Exception):
    """What a source raises in the place of a power cut."""


@dataclass
class At:
    """A source that does something when batch number `step` is asked for."""

    source: object
    step: int
    act: object
    asked: list = field(default_factory=list)

    def batch(self, step):
        self.asked.append(step)
        batch = self.source.batch(step)
        return (self.act(batch) or batch) if step == self.step else batch

    def mixture(self, start, stop):
        return self.source.mixture(start, stop)


def unplug(batch):
    raise Unplugged("the plug")


def poison(batch):
    weights = batch.loss_weights.copy()
    weights[1, 4] = np.nan
    return replace(batch, loss_weights=weights)


def numbers(lines):
    """What must be equal; times and memory may differ."""
    return [{name: line[name] for name in ("step", "loss", "grad_norm", "accuracy", "learning_rate")} for line in lines]


@pytest.fixture(scope="session")
def expected():
    """The lines of a run that was never stopped."""
    return []


@pytest.fixture
def uninterrupted(expected, run, source, tmp_path):
    if not expected:
        expected.extend(run(source, **SECTIONS)[2])
        (tmp_path / "run").rename(tmp_path / "uninterrupted")
    return expected


def test_a_line_for_every_step(uninterrupted):
    assert [line["step"] for line in uninterrupted] == list(range(1, 10))
    told = {"loss", "accuracy", "z_loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds"}
    assert set(uninterrupted[0]) == told | {"step", "data_wait", "memory_gb"}  # no mfu: a CPU's peak isn't known
    assert all(0 <= line["data_wait"] <= 1 for line in uninterrupted)
    assert all(line["tokens_per_second"] * line["seconds"] == pytest.approx(8 * 19) for line in uninterrupted)
    assert uninterrupted[-1]["loss"] < uninterrupted[0]["loss"]


@pytest.mark.parametrize("crash", [2, 6])
def test_a_crash_is_made_good(run, source, uninterrupted, tmp_path, crash):
    """Before the first checkpoint and between two; half a line of metrics stays behind."""
    with pytest.raises(Unplugged, match="^the plug$"):
        run(At(source, crash, unplug), **SECTIONS)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    resumed = At(source, -1, None)
    state, stopped, lines = run(resumed, **SECTIONS)
    assert numbers(lines) == numbers(uninterrupted)
    assert (int(state.step), stopped) == (9, None)
    assert min(resumed.asked) == (4 if crash > 4 else 0)  # earlier batches are not made again
    assert checkpoint.steps(tmp_path / "run") == [8, 9]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(run, source, uninterrupted, tmp_path, number):
    usual = signal.getsignal(number)
    state, stopped, lines = run(At(source, 5, lambda batch: os.kill(os.getpid(), number)), **SECTIONS)
    assert stopped == number
    assert checkpoint.latest_step(tmp_path / "run") == int(state.step) == lines[-1]["step"] < 9
    assert signal.getsignal(number) == usual
    *_, lines = run(source, **SECTIONS)
    assert numbers(lines) == numbers(uninterrupted)


def test_a_signal_that_comes_late_in_a_step_loses_none(run, source, tmp_path, monkeypatch):
    """After it was decided whether to save: the next step is the last."""
    check, steps = Checkpoints.check, []

    def interrupt(checkpoints):
        check(checkpoints)
        steps.append(None)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "check", interrupt)
    state, stopped, lines = run(source, **SECTIONS)
    assert stopped == signal.SIGTERM
    assert checkpoint.latest_step(tmp_path / "run") == int(state.step) == lines[-1]["step"] == 6


def test_mfu_where_the_peak_is_known(run, source, tiny, trainer_for, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e12)
    sections = {"mesh": {"data": 2}, "training": {"steps": 2}}
    *_, lines = run(source, **sections)
    flops = flops_per_step(trainer_for(**sections).abstract, tiny().model, source.batch(0))
    assert len(lines) == 2
    for line in lines:
        assert line["mfu"] * line["seconds"] == pytest.approx(flops / 2e12)  # two devices


def test_a_finished_run_goes_on_with_more_steps(run, source, tmp_path):
    constant = {"optimizer": {"schedule": "constant"}}
    run(source, training={"steps": 3}, **constant)
    *_, lines = run(source, training={"steps": 5}, **constant)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_fewer_lines_when_asked_for(run, source, uninterrupted):
    *_, lines = run(source, logging={"every": 4}, **SECTIONS)
    assert [line["step"] for line in lines] == [4, 8, 9]
    assert numbers(lines) == numbers([uninterrupted[i] for i in (3, 7, 8)])


@dataclass
class Mixed:
    """A source whose mixture says which steps it was asked for."""

    source: object

    def batch(self, step):
        return self.source.batch(step)

    def mixture(self, start, stop):
        return {"a.jsonl": start / 16, "b": stop / 16}


def test_the_mixture_since_the_last_line_also_when_resumed(run, source):
    sections = SECTIONS | {"logging": {"every": 4}}
    with pytest.raises(Unplugged):
        run(At(Mixed(source), 6, unplug), **sections)
    *_, lines = run(Mixed(source), **sections)
    told = [(line["mixture/a.jsonl"] * 16, line["mixture/b"] * 16) for line in lines]
    assert told == [(0, 4), (4, 8), (8, 9)]


@pytest.mark.parametrize("bad", [0, 5, 8])
def test_nan_stops_the_run_and_saves_the_batch(run, source, tmp_path, bad):
    with pytest.raises(NonFiniteGradients) as error:
        run(At(source, bad, poison), **SECTIONS)
    assert f"step {bad + 1} has gradients that are not finite" in str(error.value)
    assert "gradient layers.self_attn.q_proj.kernel: 3,072 NaN and 0 infinite of 3,072" in str(error.value)
    batch = np.load(tmp_path / "run" / f"failed_step_{bad + 1}.npz")
    for name, array in poison(source.batch(bad)).as_dict().items():
        assert_array_equal(batch[name], array)
    # Nothing was lost, and nothing bad was saved.
    assert checkpoint.steps(tmp_path / "run") == [step for step in (4, 8) if step <= bad]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, bad + 1))


def test_the_culprit_is_named(trainer_for, source, tmp_path):
    trainer = trainer_for()
    state = trainer.initial()
    kernel = state.trainable["layers"]["mlp"]["up_proj"]["kernel"]
    kernel.set_value(kernel.get_value().at[1, 2, 3].set(np.inf))
    message = str(explain(trainer, state, source.batch(0), tmp_path))
    assert "parameter layers.mlp.up_proj.kernel: 0 NaN and 1 infinite of 6,144" in message
    assert "parameter layers.mlp.gate_proj.kernel" not in message


def test_a_norm_that_overflows_is_told(trainer_for, source, tmp_path):
    trainer = trainer_for()
    state = trainer.initial()
    finite = jax.tree.map(lambda x: np.full(x.shape, 1e30, np.float32), state.trainable)
    finite["embed_tokens"]["embedding"].get_value()[3, 4] = -2e30
    metrics = {"loss": (1.0, 1.0)}
    message = str(
        explain(replace(trainer, gradients=lambda *_: (finite, metrics, {})), state, source.batch(0), tmp_path)
    )
    assert (
        "every number is finite, but their norm overflows; the largest is in embed_tokens.embedding: 2e+30" in message
    )


def test_a_checkpoint_that_fails_ends_the_run_and_loses_nothing(run, source, uninterrupted, monkeypatch, tmp_path):
    from vishwamai.checkpoint import store

    save = store.save

    def full(manager, step, items):
        if step == 8:
            raise OSError(28, "No space left on device")
        save(manager, step, items)

    monkeypatch.setattr(store, "save", full)
    with pytest.raises(CheckpointError, match="(?s)checkpoint 8 could not be written.*checkpoint 4 is complete"):
        run(source, **SECTIONS)
    monkeypatch.undo()
    *_, lines = run(source, **SECTIONS)
    assert numbers(lines) == numbers(uninterrupted)


def test_cut_back_keeps_whole_lines_up_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"step"\n{"step": 2}\n')
    cut_back(path, 5)
    assert path.read_text() == '{"step": 1}\n'
    cut_back(tmp_path / "none.jsonl", 3)


def test_metrics_are_json_and_tensorboard(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=True) as writer:
        writer.write({"step": 1, "loss": 2.5, "grad_norm": float("inf")})
        writer.write({"step": 2, "loss": float("nan")})
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [{"step": 1, "loss": 2.5, "grad_norm": None}, {"step": 2, "loss": None}]
    assert list(events(tmp_path / "tensorboard")) == [
        (1, {}),  # a run that starts here: what lies beyond is hidden
        (1, {"loss": 2.5, "grad_norm": float("inf")}),
        (2, {"loss": pytest.approx(float("nan"), nan_ok=True)}),
    ]


def events(folder):
    """(step, scalars) of each event: a length, its checksum, the message, its checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    raw, at = path.read_bytes(), 0
    while at < len(raw):
        (size,) = struct.unpack_from("Q", raw, at)
        event = Event.FromString(raw[at + 12 : at + 12 + size])
        at += size + 16
        if not event.file_version:
            yield event.step, {value.tag: value.simple_value for value in event.summary.value}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.timeout(30)
def test_a_full_disk_stops_the_metrics_with_a_message(tmp_path):
    with pytest.raises(OSError, match="metrics can't be written .No space left.*same command resumes") as error:
        with MetricsWriter(tmp_path, 0, tensorboard=True) as writer:
            writer._file = open("/dev/full", "w")
            writer.write({"step": 1, "loss": 2.5})
    assert error.value.filename == str(tmp_path)


def test_a_full_disk_does_not_hide_the_culprit(trainer_for, source, tmp_path, monkeypatch):
    def full(file, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    trainer = trainer_for()
    message = str(explain(trainer, trainer.initial(), poison(source.batch(0)), tmp_path))
    assert "gradient layers.self_attn.q_proj.kernel: 3,072 NaN" in message
    assert "could not be saved in" in message and "No space left" in message
