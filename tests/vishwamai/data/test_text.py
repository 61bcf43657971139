"""Conversations without images for a text model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vishwamai.config import ConfigError
from vishwamai.data.sources import DataError
from vishwamai.data.text import TextData, batch_source
from vishwamai.tokenizer import VishwamAITokenizer

TOKENIZER = Path(__file__).resolve().parents[3] / "configs" / "tokenizers" / "parsit_tiny"


@pytest.fixture
def source_of(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = VishwamAITokenizer.from_pretrained(TOKENIZER)

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
