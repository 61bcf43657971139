"""A finite pool: each example once an epoch, the same rows after a restart, lengths kept."""

import json
import logging

import numpy as np
import pytest

from vishwamai.data import lengths as lengths_module
from vishwamai.data import pool as pool_module
from vishwamai.data.lengths import length_index
from vishwamai.data.packing import Capacity, Example, ImageLayout, first_fit
from vishwamai.data.pool import PackedPool, TooLong, fitting, plan
from vishwamai.data.sources import DataError, FilesConfig, Record, Records

CAPACITY = Capacity(50, 8, ImageLayout(2, 2, 12))


def pool_of(count, seed=(0,), too_long=TooLong.ERROR, longest=40, ends=None):
    lengths = np.random.default_rng(5).integers((1, 0), (longest, 3), (count, 2)) * (1, 4)
    records = [Record({"n": n}, f"a.json item {n}", None, None) for n in range(count)]

    def load(record):
        n = record.data["n"]
        return Example(np.full(lengths[n, 0], n), np.ones(lengths[n, 0], np.float32))

    return PackedPool(records, lengths, load, CAPACITY, seed, too_long, ends)


def said(pool, rows):
    return [[int(example.tokens[0]) for example in pool.row(row)] for row in rows]


@pytest.mark.parametrize("window", [16, 4096])
def test_each_example_exactly_once_an_epoch(monkeypatch, window):
    monkeypatch.setattr(pool_module, "WINDOW", window)
    pool = pool_of(300)
    epoch = len(pool.plan)
    epochs = [said(pool, range(number * epoch, (number + 1) * epoch)) for number in range(3)]
    for rows in epochs:
        assert sorted(sum(rows, [])) == list(range(300))
        for row in rows:
            assert (pool.lengths[row].sum(axis=0) <= (CAPACITY.tokens, CAPACITY.patches)).all()
    assert epochs[0] != epochs[1] != epochs[2]


def test_windows_are_packed_by_first_fit(monkeypatch):
    monkeypatch.setattr(pool_module, "WINDOW", 64)
    lengths = np.random.default_rng(1).integers((1, 0), (40, 3), (150, 2)) * (1, 4)
    found = plan(np.arange(150), lengths, CAPACITY, (3,))
    row = 0
    order = np.random.default_rng((3,)).permutation(150)
    for start in range(0, 150, 64):
        window = order[start : start + 64]
        row_of = first_fit(lengths[window], CAPACITY)
        for number in range(row_of.max() + 1):
            assert found[row].tolist() == window[row_of == number].tolist()
            row += 1
    assert row == len(found)


def test_a_restart_gives_the_same_rows_and_another_seed_others():
    rows = [0, 5, 1000, 123_456_789]
    assert said(pool_of(100), rows) == said(pool_of(100), rows)
    assert said(pool_of(100), range(20)) != said(pool_of(100, seed=(1,)), range(20))


def test_tokens_of_each_dataset_are_counted_without_loading(monkeypatch):
    """Of any rows, whole epochs among them: those of the rows themselves."""
    pool = pool_of(60, ends=(10, 11, 60))
    rows = len(pool.plan)
    for start, stop in [(0, 0), (3, 9), (0, rows), (rows - 2, rows + 1), (5, 3 * rows + 4), (rows, 2 * rows)]:
        expected = [0, 0, 0]
        for row in range(start, stop):
            for example in pool.row(row):
                expected[np.searchsorted((9, 10, 59), example.tokens[0])] += len(example.tokens)
        with monkeypatch.context() as nothing:
            nothing.setattr(pool, "load", None)
            assert pool.tokens(start, stop).tolist() == expected
    assert pool.tokens_per_epoch.sum() == pool.lengths[:, 0].sum()


def test_too_long_is_an_error_or_a_counted_skip(caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(DataError, match=r"\d+ of 60 examples .* a\.json item \d+, needs 5\d tokens .*data\.max_length"):
        pool_of(60, longest=60)
    pool = pool_of(60, longest=60, too_long=TooLong.SKIP)
    expected = np.flatnonzero(pool.lengths[:, 0] <= 50).tolist()
    assert sorted(sum(said(pool, range(len(pool.plan))), [])) == expected
    assert pool.skipped == 60 - len(expected) > 0
    assert f"{pool.skipped} of 60 examples" in caplog.text


def test_nothing_fits():
    with pytest.raises(DataError, match="2 of 2 examples"):
        fitting(np.asarray([[51, 0], [1, 12]]), CAPACITY, TooLong.SKIP, str)


def test_a_file_that_changed_after_counting_is_noticed():
    pool = pool_of(10)
    pool.lengths = pool.lengths + 1
    with pytest.raises(DataError, match="the file changed"):
        pool.row(0)


class Tokenizer:
    def __init__(self, folder):
        self.folder = folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tokenizer.json").write_text("1")
    (tmp_path / "a.json").write_text(json.dumps([{"n": n} for n in range(4)]))
    return tmp_path


def count(folder, key="k"):
    """The index, and how many records were measured for it."""
    measured = []

    def measure(record):
        measured.append(record)
        return record.data["n"], 0

    records = Records([FilesConfig(json_path=str(folder / "a.json"))], (0,), FilesConfig)
    return length_index(records, measure, Tokenizer(folder), key).tolist(), len(measured)


def test_lengths_are_counted_once_and_again_when_anything_changed(files):
    index = [[n, 0] for n in range(4)]
    assert count(files) == (index, 4)
    assert count(files) == (index, 0)
    assert count(files, key="other") == (index, 4)
    (files / "tokenizer.json").write_text("2")
    assert count(files) == (index, 4)
    (files / "a.json").write_text(json.dumps([{"n": 7}]))
    assert count(files) == ([[7, 0]], 1)


def test_damaged_counts_are_counted_anew(files):
    index, _ = count(files)
    (kept,) = (files / "cache").rglob("*.*")
    for content in (b"", kept.read_bytes()[:-3]):
        kept.write_bytes(content)
        assert count(files) == (index, 4)
        assert count(files) == (index, 0)


def test_a_full_disk_leaves_no_half_of_a_file(files, monkeypatch, caplog):
    def full(file, array):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(lengths_module.np, "save", full)
    assert count(files)[1] == 4
    assert "not kept for the next run: No space left on device" in caplog.text
    assert [path for path in (files / "cache").rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_written_is_said(files, monkeypatch, caplog):
    (files / "blocked").write_text("a file")
    monkeypatch.setattr(lengths_module, "_folder", lambda: files / "blocked" / "lengths")
    assert count(files)[1] == 4
    assert "token counts are not kept" in caplog.text
