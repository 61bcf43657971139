"""Documents and conversations for a text model, mixed by weight."""

import json
import logging
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from vishwamai.config import ConfigError
from vishwamai.data.pieces import encode_document
from vishwamai.data.sources import DataError
from vishwamai.data.text import TextData, batch_source
from vishwamai.tokenizer import VishwamAITokenizer

TOKENIZERS = Path(__file__).resolve().parents[3] / "configs" / "tokenizers"


@pytest.fixture
def source_of(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = VishwamAITokenizer.from_pretrained(TOKENIZERS / "parsit_tiny")

    def make(records, vocab_size=tokenizer.vocab_size):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps(r if isinstance(r, dict) else {"messages": r}) for r in records))
        experiment = SimpleNamespace(
            model=SimpleNamespace(vocab_size=vocab_size),
            data=TextData(max_length=128, datasets=[{"json_path": str(path)}]),
            seed=0,
            training=SimpleNamespace(batch_size=2),
        )
        return batch_source(experiment, tokenizer), tokenizer

    return make


def talk(n):
    return [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"n{n}"}]


def test_conversations_share_rows_and_the_assistant_is_learned(source_of):
    source, tokenizer = source_of([talk(n) for n in range(6)])
    rows = len(source.streams[0].plan)
    assert rows < 6
    batch = source.batch(0)
    assert batch.patches is None and batch.tokens.shape == (2, 128)
    said = [tokenizer.decode(e.tokens[e.loss_weights > 0]) for row in range(rows) for e in source.row(row)]
    assert sorted(said) == [f"n{n}<|im_end|>" for n in range(6)]


def test_errors_say_the_line(source_of):
    with pytest.raises(DataError, match="a.jsonl line 2: "):
        source_of([talk(0), [{"role": "robot", "content": "x"}, *talk(1)]])
    with pytest.raises(DataError, match="a.jsonl line 1: .*half a surrogate pair"):
        source_of([[{"role": "user", "content": "\ud83d"}, *talk(1)]])
    with pytest.raises(DataError, match="a.jsonl line 2 shows 'a.png', which a text model can't see"):
        source_of([talk(0), {"image": "a.png", "messages": talk(1)}])
    with pytest.raises(DataError, match="a.jsonl line 1: the messages hold 1 images and 0 images are given"):
        source_of([[{"role": "user", "content": [{"type": "image"}]}, *talk(1)]])
    with pytest.raises(ConfigError, match="vocab_size is 5"):
        source_of([talk(0)], vocab_size=5)


# --- documents ---


@pytest.fixture
def source_from(tmp_path, monkeypatch):
    """source_from({"a": texts}, datasets, **data) -> the source and tokenizer; a.jsonl holds the texts of a."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = VishwamAITokenizer.from_pretrained(TOKENIZERS / "vishwamai_tiny")

    def make(files, datasets, seed=0, **data):
        for name, texts in files.items():
            records = [text if isinstance(text, dict) else {"text": text} for text in texts]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        places = [{key: f"{tmp_path}/{v}" if "path" in key else v for key, v in entry.items()} for entry in datasets]
        experiment = SimpleNamespace(
            model=SimpleNamespace(vocab_size=tokenizer.vocab_size),
            data=TextData(**{"max_length": 64, "datasets": places} | data),
            seed=seed,
            training=SimpleNamespace(batch_size=4),
        )
        return batch_source(experiment, tokenizer), tokenizer

    return make


def texts_of(name, count, longest=90):
    draw = np.random.default_rng(len(name))
    return [f"{name} {n}: " + "word and " * int(draw.integers(0, longest)) for n in range(count)]


def rows_of_epoch(source):
    """(tokens, segment ids, positions, loss weights) of every row of an epoch, from the batches."""
    rows = len(source.streams[0].plan)
    batches = [source.batch(step) for step in range(-(-rows // source.batch_size))]
    names = ("tokens", "segment_ids", "positions", "loss_weights")
    return list(
        zip(*(np.concatenate([getattr(batch, name) for batch in batches])[:rows] for name in names), strict=True)
    )


def test_rows_are_the_documents_token_by_token(source_from):
    """Every piece once an epoch: sorted by their documents, they are these; positions restart, all but the first."""
    texts = texts_of("a", 40)
    source, tokenizer = source_from({"a": texts}, [{"path": "a.jsonl"}])
    examples = []
    for tokens, segments, positions, weights in rows_of_epoch(source):
        assert (np.diff(segments[segments > 0]) >= 0).all() and (segments[np.count_nonzero(segments) :] == 0).all()
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            assert positions[at].tolist() == list(range(at.sum()))
            assert weights[at].tolist() == [0, *[1] * (at.sum() - 1)]
            examples.append(tuple(tokens[at].tolist()))
    expected = Counter()
    for text in texts:
        ids, pieces = encode_document(text, tokenizer).tolist(), []
        while ids:  # nothing is lost: the pieces stand in the rows whole
            piece = next(e for e in examples if list(e) == ids[: len(e)] and (len(e) > 40 or len(e) == len(ids)))
            pieces.append(piece)
            ids = ids[len(piece) :]
        expected.update(pieces)
    assert Counter(examples) == expected
    assert max(len(example) for example in examples) > 60


def test_a_restart_and_any_step_give_the_same_rows(source_from):
    files = {"a": texts_of("a", 30), "b": texts_of("bb", 20)}
    datasets = [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 1}]
    first, _ = source_from(files, datasets)
    batches = [first.batch(step) for step in range(60)]
    again, _ = source_from({}, datasets)
    for step in (59, 7, 31):
        for name, array in again.batch(step).as_dict().items():
            assert (array == batches[step].as_dict()[name]).all()
    other, _ = source_from({}, datasets, seed=1)
    assert (other.batch(0).tokens != batches[0].tokens).any()


def said_by(source, tokenizer, names, start, stop):
    """Tokens of each name in the batches themselves: every dataset has a letter of its own."""
    counts = Counter()
    for step in range(start, stop):
        batch = source.batch(step)
        for row in range(batch.rows):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                tokens = batch.tokens[row, batch.segment_ids[row] == segment]
                text = tokenizer.decode(tokens)
                (name,) = [name for name in names if names[name] in text]
                counts[name] += len(tokens)
    return {name: counts[name] / sum(counts.values()) for name in names}


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.1, 0.9), (None, None)])
def test_the_mixture_that_is_told_is_that_of_the_batches(source_from, caplog, weights):
    caplog.set_level(logging.INFO)
    files = {"a": ["aa" * n for n in range(1, 60)], "b": ["bb" * n for n in range(1, 25)]}
    datasets = [{"path": "a.jsonl", "weight": weights[0]}, {"path": "b.jsonl", "weight": weights[1]}]
    source, tokenizer = source_from(files, datasets)
    names = {"a.jsonl": "a", "b.jsonl": "b"}
    for start, stop in [(0, 1), (3, 9), (0, 50)]:
        assert source.mixture(start, stop) == pytest.approx(said_by(source, tokenizer, names, start, stop))
    if weights[0] is not None:  # rows are as they were promised, to the row
        rows = [
            tokenizer.decode(row, skip_special_tokens=True) for step in range(50) for row in source.batch(step).tokens
        ]
        assert sum("a" in row for row in rows) == round(200 * weights[0] / sum(weights))
    epochs, tokens = source.mixture(0, 1000)["a.jsonl"], source.streams[0].tokens_per_epoch[0]
    (told,) = re.findall(rf"a\.jsonl: {tokens:,} tokens an epoch, planned as ([\d.]+) % of all tokens", caplog.text)
    assert epochs == pytest.approx(float(told) / 100, abs=0.02)


def test_one_dataset_needs_no_mixture(source_from):
    source, _ = source_from({"a": ["x"]}, [{"path": "a.jsonl"}])
    assert source.mixture(0, 5) == {}


def test_datasets_of_one_name_are_told_apart(source_from):
    strategies = [{"path": "a.jsonl", "sampling_strategy": f"{part}:50%"} for part in ("first", "end")]
    source, _ = source_from({"a": texts_of("a", 8)}, strategies)
    assert list(source.mixture(0, 1)) == ["a.jsonl.0", "a.jsonl.1"]


def test_documents_and_conversations_share_rows(source_from):
    files = {"a": texts_of("a", 10, longest=9), "talks": [{"messages": talk(n)} for n in range(10)]}
    source, tokenizer = source_from(files, [{"path": "a.jsonl"}, {"json_path": "talks.jsonl"}])
    examples = [example for row in range(len(source.streams[0].plan)) for example in source.row(row)]
    said = [tokenizer.decode(example.tokens[example.loss_weights > 0]) for example in examples]
    assert sorted(text for text in said if text.endswith("<|im_end|>")) == [f"n{n}<|im_end|>" for n in range(10)]
    assert len(said) == 20 and sum(text.startswith("<s>a ") for text in said) == 10
    rows = [{e.tokens[0] == tokenizer.bos_token_id for e in source.row(n)} for n in range(len(source.streams[0].plan))]
    assert {True, False} in rows
    assert sum(source.mixture(0, 3).values()) == pytest.approx(1)


def test_held_out_documents_are_never_read(source_from, tmp_path):
    files = {"a": texts_of("a", 11), "b": ["b", *texts_of("a", 3)]}
    held_out = [{"path": f"{tmp_path}/a.jsonl", "sampling_strategy": "end:30%"}]
    source, tokenizer = source_from(files, [{"path": "a.jsonl"}, {"path": "b.jsonl"}], held_out=held_out)
    read = " ".join(tokenizer.decode(e.tokens) for row in range(len(source.streams[0].plan)) for e in source.row(row))
    assert [n for n in range(11) if f"a {n}:" in read] == list(range(7))  # 30 % are 3.3, so 4


def test_long_documents(source_from):
    files = {"a": ["short", "long " * 100]}
    with pytest.raises(DataError, match=r"1 of 2 examples .*a.jsonl line 2 .*, needs \d+ tokens .*data.max_length"):
        source_from(files, [{"path": "a.jsonl"}], long_documents="whole")
    source, _ = source_from(files, [{"path": "a.jsonl"}], long_documents="whole", too_long="skip")
    assert source.streams[0].skipped == 1
    source, _ = source_from(files, [{"path": "a.jsonl"}])
    assert source.streams[0].skipped == 0 and len(source.streams[0].records) > 2


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], "either every dataset has a weight or none has"),
        ([{"path": "a", "json_path": "b"}], "either json_path .conversations. or path .documents."),
        ([{}], "either json_path .conversations. or path .documents."),
        ([{"json_path": "a", "text_field": "x"}], "text_field has no meaning for conversations"),
        ([{"json_path": "a", "format": "jsonl"}], "format has no meaning for conversations"),
        ([{"path": "a", "weight": 0}], "greater than 0"),
        ([], "at least 1 item"),
    ],
)
def test_datasets_that_cannot_be(datasets, message):
    with pytest.raises(ValidationError, match=message):
        TextData(max_length=8, datasets=datasets)


def test_a_resolved_config_says_the_same():
    data = TextData(max_length=8, datasets=[{"path": "a"}, {"json_path": "b.json"}], held_out=[{"path": "c"}])
    assert TextData.model_validate(data.model_dump(mode="json")) == data
