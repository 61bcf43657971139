"""`vishwamai tokenizer train`: our tokenizer, Transformers' and SentencePiece agree; the same text, the same bytes."""

import json
import re
import shutil
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai import cli
from vishwamai.chat import encode_conversation
from vishwamai.tokenizer import VishwamAITokenizer
from vishwamai.tokenizer_training import ModelType, train_tokenizer

DOCUMENTS = list(topics.values())[:39]
# Rows of one character are equally likely cut in several ways: each library takes its own.
PROSE = [line for text in DOCUMENTS for line in text.split("\n") if not re.search(r"(.)\1", line)][:200]
ODD_TEXTS = [
    "",
    " ",
    "  leading,  double and trailing  ",
    "a\nb\n\n\n    indented\r\n\ttab",
    "emoji 🦄 and Кириллица, 日本語, e\u0301",
    "<0x41> <s> </s> <unk> <pad>",
    "<|im_start|>user\nhi<|im_end|>\n",
    *PROSE,
]
PARTS = [*"The statement is of the class".split(), " ", "  ", "\n", "<", ">", "|", "<s>", "é", "🦄", "<0x0A>", "=="]
TEXTS = st.lists(st.sampled_from(PARTS)).map("".join)


@pytest.fixture(scope="module", params=ModelType)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "tokenizer"
    train_tokenizer(DOCUMENTS, 600, folder, request.param)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return VishwamAITokenizer.from_pretrained(folder)


def test_ids_are_those_of_transformers(folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert len(theirs) == tokenizer.vocab_size == 600
    for text in ODD_TEXTS:
        assert tokenizer.encode(text) == theirs(text)["input_ids"], text
        assert tokenizer.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer.encode(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert theirs.unk_token_id == tokenizer.token_to_id("<unk>")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the object"}]
    ours = encode_conversation(talk, tokenizer)
    assert ours.tokens.tolist() == theirs.apply_chat_template(talk, return_dict=False)
    assert tokenizer.decode(ours.tokens[ours.loss_mask]) == "the object<|im_end|>"


@settings(deadline=None)
@given(TEXTS)
def test_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == "<s>" + text
    plain = tokenizer.encode_plain(text)
    assert tokenizer.decode(plain) == text
    assert set(plain).isdisjoint(token.id for token in tokenizer.added_tokens.values())


def test_ids_are_those_of_sentencepiece(folder, tokenizer, tmp_path):
    """`tokenizer.model` alone, as tools without tokenizer.json read it."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    alone = VishwamAITokenizer.from_pretrained(tmp_path)
    for text in ODD_TEXTS:
        assert alone.encode_plain(text) == tokenizer.encode_plain(text), text
        spelled = text.replace("<unk>", "")  # a token to find for Transformers only
        assert alone.encode(spelled) == tokenizer.encode(spelled)
    assert {text: token.id for text, token in alone.added_tokens.items()} == {
        text: token.id for text, token in tokenizer.added_tokens.items() if text != "<unk>"
    }


def test_words_are_pieces_and_line_breaks_are_not_in_any(tokenizer):
    assert tokenizer.encode_plain(" statement") == [tokenizer.token_to_id("\u2581statement")]
    assert tokenizer.encode_plain("\n") == [tokenizer.token_to_id("<0x0A>")]
    assert not any("\n" in tokenizer.id_to_token(id) for id in range(tokenizer.vocab_size))
    assert tokenizer.eos_token_ids == (tokenizer.eos_token_id, tokenizer.token_to_id("<|im_end|>"))


def test_the_same_text_gives_the_same_bytes(folder, tmp_path):
    kind = json.loads((folder / "tokenizer.json").read_text())["model"]["type"].lower()
    train_tokenizer(DOCUMENTS, 600, tmp_path / "again", ModelType(kind))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_long_lines_are_learned_too(tmp_path):
    """SentencePiece itself leaves out lines of more than 4,192 bytes."""
    train_tokenizer(["unforgettable " * 2_000, "a b c"], 300, tmp_path / "t", ModelType.BPE)
    assert len(VishwamAITokenizer.from_pretrained(tmp_path / "t").encode_plain(" unforgettable")) == 1


# --- the command ---


def command(capsys, *arguments):
    code = cli.main(["tokenizer", "train", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_the_command(tmp_path, capsys):
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    (tmp_path / "more.jsonl").write_text(json.dumps({"body": "zebras graze behind tall fences " * 5}))
    out = tmp_path / "out"
    code, told = command(capsys, "--input", f"{tmp_path}/*.txt", "--vocab-size", 600, "--output", out)
    assert (code, told) == (0, f"{out}: 600 ids learned from 39 documents\n")
    assert VishwamAITokenizer.from_pretrained(out).vocab_size == 600

    fields = ["--text-field", "body", "--model-type", "bpe"]
    code, told = command(
        capsys, "--input", tmp_path / "more.jsonl", *fields, "--vocab-size", 290, "--output", tmp_path / "body"
    )
    assert code == 0 and VishwamAITokenizer.from_pretrained(tmp_path / "body").encode_plain(" zebra") != []

    part = ["--sampling-strategy", "first:10%"]
    code, told = command(capsys, "--input", f"{tmp_path}/*.txt", *part, "--vocab-size", 500, "--output", tmp_path / "p")
    assert code == 0 and "from 4 documents" in told


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("some words", ["--vocab-size", "9000"], r"the text gives at most \d+ pieces, asked for 9000: lower it"),
        ("some words", ["--vocab-size", "100"], r"alone are \d+ pieces, asked for 100: raise it"),
        (" \n\n", ["--vocab-size", "300"], "the input holds no text to learn pieces from"),
        ("words", ["--vocab-size", "300", "--format", "csv"], "format: Input should be 'auto', 'text'"),
        ("words", ["--vocab-size", "300", "--split", "x", "--format", "text"], "split has no meaning for format=text"),
        (None, ["--vocab-size", "300"], r"no data file .*a\.txt"),
    ],
)
def test_bad_input_is_told(tmp_path, capsys, content, arguments, message):
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    code, told = command(capsys, "--input", tmp_path / "a.txt", "--output", tmp_path / "out", *arguments)
    assert code == 1 and told.startswith("error: ") and not (tmp_path / "out").exists()
    assert re.search(message, told), told


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("words")
    code, told = command(capsys, "--input", tmp_path / "a.txt", "--vocab-size", 300, "--output", tmp_path)
    assert code == 1 and f"{tmp_path} is there and not empty" in told
    code, told = command(capsys, "--input", tmp_path / "a.txt", "--vocab-size", 300, "--output", tmp_path / "a.txt")
    assert code == 1 and "a.txt is there" in told
