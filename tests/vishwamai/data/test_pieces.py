"""Documents cut into pieces: every character once, every piece fits, and the tokens are those of the whole."""

import logging
from pathlib import Path

import numpy as np
import pytest
import sentencepiece_models
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai.data.documents import DocumentsConfig, open_documents
from vishwamai.data.pieces import cut, encode_document, encode_piece, open_pieces
from vishwamai.data.sources import DataError
from vishwamai.tokenizer import VishwamAITokenizer

TOKENIZERS = Path(__file__).resolve().parents[3] / "configs" / "tokenizers"
TEXTS = st.text(st.sampled_from("ab <0x4>\né🦄日|im_end.\u0301"), min_size=1, max_size=200) | st.lists(
    st.sampled_from(["Hello", " world", "  ", "\n\n", "<|im_end|>", "</s>", "the quick brown fox", "🦄", "="]),
    min_size=1,
).map("".join)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Tokenizers with and without bos, with and without a space before a text."""
    spaced = sentencepiece_models.train(  # as Llama 2's
        tmp_path_factory.mktemp("spaced"),
        user_defined_symbols=["<|im_end|>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    folders = {"tiny": TOKENIZERS / "vishwamai_tiny", "characters": TOKENIZERS / "parsit_tiny", "spaced": spaced}
    return {name: VishwamAITokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["tiny", "characters", "spaced"])
@settings(deadline=None)
@given(text=TEXTS, length=st.integers(8, 40))
def test_nothing_is_lost(opened, name, text, length):
    tokenizer = opened[name]
    pieces = cut(text, tokenizer, length)
    assert [start for start, *_ in pieces] == [0, *(end for _, end, _ in pieces[:-1])]
    assert pieces[-1][1] == len(text) and all(start < end for start, end, _ in pieces)
    tokens = [encode_piece(text, start, end, tokenizer) for start, end, _ in pieces]
    assert [len(piece) for piece in tokens] == [count for *_, count in pieces]
    assert all(len(piece) <= length for piece in tokens)
    assert np.concatenate(tokens).tolist() == encode_document(text, tokenizer).tolist()


def test_tokens_of_a_real_text_are_those_of_the_whole(opened, shared):
    import pydoc_data.topics

    text = max(pydoc_data.topics.topics.values(), key=len)
    qwen = VishwamAITokenizer.from_pretrained(shared / "qwen3_tokenizer")
    for tokenizer in (*opened.values(), qwen):
        whole = encode_document(text, tokenizer)
        pieces = cut(text, tokenizer, 100)
        tokens = np.concatenate([encode_piece(text, start, end, tokenizer) for start, end, _ in pieces])
        assert tokens.tolist() == whole.tolist()
        # Rows are used: a piece is full but for the bytes of one character, the last two for eos.
        assert min(count for *_, count in pieces[:-2]) >= 97


def test_bos_and_eos_stand_at_the_ends_of_a_document(opened):
    tokenizer = opened["tiny"]
    text = "</s> is ordinary text, " * 30
    whole = encode_document(text, tokenizer)
    assert whole[0] == tokenizer.bos_token_id and whole[-1] == tokenizer.eos_token_id
    assert set(whole[1:-1]).isdisjoint({tokenizer.bos_token_id, tokenizer.eos_token_id})
    assert tokenizer.decode(whole[1:-1]) == text
    first, *middle, last = [encode_piece(text, start, end, tokenizer) for start, end, _ in cut(text, tokenizer, 50)]
    assert middle and first[0] == whole[0] and last[-1] == whole[-1]
    for piece in middle:
        assert set(piece).isdisjoint({tokenizer.bos_token_id, tokenizer.eos_token_id})


def test_a_piece_is_never_eos_alone(opened):
    tokenizer = opened["tiny"]
    for count in range(1, 60):
        pieces = cut("=" * count, tokenizer, 8)
        assert all(end > start for start, end, _ in pieces) and pieces[-1][2] >= 2


def test_a_row_too_short_for_a_character(opened):
    with pytest.raises(ValueError, match="character 1 alone needs more than a row's 3 tokens"):
        cut("a🦄b", opened["tiny"], 3)


def test_characters_without_a_token_fill_rows_too(opened):
    """Their bytes have one place in common, however many characters there are."""
    for text in ("日本語" * 100, "a " + "日" * 300 + " b" * 100):
        pieces = cut(text, opened["tiny"], 50)
        assert sum(count for *_, count in pieces) == len(encode_document(text, opened["tiny"]))
        assert len(pieces) < 1.5 * sum(count for *_, count in pieces) / 50


def documents_of(tmp_path, texts, name="a"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return open_documents([DocumentsConfig(path=str(folder))], 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_pieces_are_counted_once(tmp_path, opened, monkeypatch):
    texts = [f"{n} " * (5 * n + 1) for n in range(9)]
    documents = documents_of(tmp_path, texts)
    pieces = open_pieces(documents, opened["tiny"], 32)
    tokens = [pieces[number].example(opened["tiny"]).tokens for number in range(len(pieces))]
    assert pieces.lengths.tolist() == [[len(piece), 0] for piece in tokens]
    expected = [encode_document(text, opened["tiny"]) for text in texts]
    assert np.concatenate(tokens).tolist() == np.concatenate(expected).tolist()
    assert len(pieces) > len(texts) and pieces[len(pieces) - 1].where.startswith(f"{tmp_path}/a/008.txt (characters")

    from vishwamai.data import pieces as module

    counted = []
    monkeypatch.setattr(module, "cut", lambda *arguments: counted.append(arguments) or cut(*arguments))
    again = open_pieces(documents, opened["tiny"], 32)
    assert again.lengths.tolist() == pieces.lengths.tolist() and not counted
    open_pieces(documents, opened["tiny"], 33)
    assert len(counted) == 9
    (tmp_path / "a" / "000.txt").write_text("other")
    open_pieces(documents_of(tmp_path, ["other"]), opened["tiny"], 32)
    assert len(counted) == 18


def test_whole_documents(tmp_path, opened):
    pieces = open_pieces(documents_of(tmp_path, ["a " * 100, "b"]), opened["tiny"], None)
    assert len(pieces) == 2 and pieces.lengths[0, 0] > 100


def test_documents_without_text_are_named(tmp_path, opened, caplog):
    caplog.set_level(logging.WARNING)
    documents = documents_of(tmp_path, ["one", " \n", "two", ""])
    for _ in range(2):  # also where the cache knows it
        caplog.clear()
        pieces = open_pieces(documents, opened["tiny"], 32)
        assert [piece.document for piece in pieces] == [0, 2]
        assert f"without text, left out: 2 of 4 documents; the first is {tmp_path}/a/001.txt" in caplog.text
    with pytest.raises(DataError, match=r"none of the 1 documents can be learned from; the first is .*000\.txt"):
        open_pieces(documents_of(tmp_path, [" "], "blank"), opened["tiny"], 32)


def test_what_is_held_out_is_not_learned(tmp_path, opened, caplog):
    caplog.set_level(logging.INFO)
    documents = documents_of(tmp_path, ["one", "two", "three", "two"])
    held_out = documents_of(tmp_path, ["two", "four"], "held_out")
    assert [piece.document for piece in open_pieces(documents, opened["tiny"], 32)] == [0, 1, 2, 3]
    assert [piece.document for piece in open_pieces(documents, opened["tiny"], 32, held_out)] == [0, 2]
    assert "held out, not learned: 2 of 4 documents; the first is" in caplog.text


def test_no_unicode_is_named(tmp_path, opened):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2: the text has half a surrogate pair"):
        open_pieces(open_documents([DocumentsConfig(path=str(tmp_path / "a.jsonl"))], 0), opened["tiny"], 32)
    (tmp_path / "a.jsonl").write_text(json_line := '{"text": "fine 🦄"}\n')
    assert "🦄" in json_line
    with pytest.raises(DataError, match=r"a\.jsonl line 1: character 5 alone needs more than a row's 3 tokens"):
        open_pieces(open_documents([DocumentsConfig(path=str(tmp_path / "a.jsonl"))], 0), opened["tiny"], 3)
