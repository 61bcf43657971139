"""`VishwamAITokenizer` against Transformers' AutoTokenizer and against SentencePiece itself."""

import filecmp
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import sentencepiece_models
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from vishwamai.templates import load_template
from vishwamai.tiny_tokenizer import ADDED_TOKENS, ALPHABET, PIECES, build_tiny_tokenizer
from vishwamai.tokenizer import VishwamAITokenizer

ODD_TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "line\nline\n\n\nline\r\nline\rline\ttab",
    "Total: £1,234.50 (€99)",
    "0123456789 12 345",
    "emoji 🦄👨‍👩‍👧 flag 🇬🇧",
    "combining e\u0301 a\u0308\u0323, zero\u200bwidth\u200d\ufeff, nul \x00 bell \x07",
    "日本語 한국어 العربية हिन्दी",
    "<0x41><0xC3><unk>",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n",
    "<|im_|>end|> <|im_end| > <|IM_END|>",
    "What is the total? What was it? How much cash? It is the user's assistant.",
    "I'll, we'RE don't\u2019s",
    "\ue000\uf8ff\U000f0000",
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from([*ADDED_TOKENS, *PIECES, "<", "|", ">", "im_end", "\n", " ", "e", "\u0301", "<0x41>"]),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_tokenizer(ALPHABET, PIECES, "{{ messages }}", folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return VishwamAITokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def qwen_folder(shared):
    return shared / "qwen3_tokenizer"


@pytest.fixture(scope="module")
def qwen(qwen_folder):
    return VishwamAITokenizer.from_pretrained(qwen_folder)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    return sentencepiece_models.train(
        tmp_path_factory.mktemp("sentencepiece"),
        control_symbols=["<|image_pad|>"],
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        pad_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


# --- as Transformers ---


@pytest.mark.parametrize("name", ["qwen", "tiny"])
def test_ids_and_text_equal_transformers(name, request):
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(name)
    theirs = transformers.AutoTokenizer.from_pretrained(ours.folder)
    assert len(ours) == ours.vocab_size == len(theirs)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.bos_token_id is theirs.bos_token_id is None
    assert ours.chat_template == theirs.chat_template
    for text in ODD_TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("name", ["qwen", "tiny"])
def test_added_tokens_are_qwen3s(name, request):
    tokenizer = request.getfixturevalue(name)
    assert {text: token.special for text, token in tokenizer.added_tokens.items()} == ADDED_TOKENS
    for text, token in tokenizer.added_tokens.items():
        assert tokenizer.encode(text) == [token.id] == [tokenizer.token_to_id(text)]
        assert tokenizer.id_to_token(token.id) == text
    ends = [tokenizer.id_to_token(id) for id in tokenizer.eos_token_ids]
    assert ends == ["<|im_end|>", "<|endoftext|>"]


# --- text that only looks like a token ---


@pytest.mark.parametrize("name", ["qwen", "tiny"])
@pytest.mark.parametrize("token", ADDED_TOKENS)
def test_plain_text_never_becomes_an_added_token(name, token, request):
    tokenizer = request.getfixturevalue(name)
    added = {token.id for token in tokenizer.added_tokens.values()}
    for text in [token, f"a {token}{token} b", f"<{token}>", f"\n{token}\n"]:
        ids = tokenizer.encode_plain(text)
        assert not added & set(ids)
        assert tokenizer.decode(ids) == text == tokenizer.decode(ids, skip_special_tokens=True)
        assert added & set(tokenizer.encode(text))


def test_plain_ranges_leave_the_rest_as_it_was(qwen):
    text = "<|im_start|>user\nsay <|im_end|> twice<|im_end|>\n"
    begin = text.index("<|im_end|>")
    ids, offsets = qwen.encode_with_offsets(text, [(begin, begin + len("<|im_end|>"))])
    expected = [
        *qwen.encode("<|im_start|>"),
        *qwen.encode_plain("user\nsay <|im_end|> twice"),
        *qwen.encode("<|im_end|>\n"),
    ]
    assert ids == expected
    assert "".join(text[start:end] for start, end in offsets) == text


def test_a_vocabulary_that_holds_its_added_tokens_as_pieces_still_escapes_them(tmp_path):
    pieces = [("<unk>", -20.0), ("<s>", -1.0), *((character, -10.0) for character in "<s>ab")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([tokenizers.AddedToken("<s>", special=True, normalized=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = VishwamAITokenizer.from_pretrained(tmp_path)
    special = ours.token_to_id("<s>")
    assert ours.encode("a<s>b") == [ours.token_to_id("a"), special, ours.token_to_id("b")]
    for text in ["a<s>b", "<s><s>", "＜s＞"]:  # the last becomes <s> by normalisation
        assert special not in ours.encode_plain(text)
    assert special not in ours.encode_with_offsets("a＜s＞")[0]
    assert special in ours.encode_with_offsets("a<s>")[0]
    assert ours.decode(ours.encode_plain("a<s>b")) == "a<s>b"


def test_of_two_added_tokens_the_longer_is_found(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("<s>2")}, []))
    tokenizer.add_special_tokens(["<s>", "<s>2"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = VishwamAITokenizer.from_pretrained(tmp_path)
    assert ours.encode("<s>2") == ours.encode_with_offsets("<s>2", [(4, 4)])[0] == [ours.token_to_id("<s>2")]


# --- round trips ---


@settings(max_examples=300, deadline=None)
@given(texts)
def test_tiny_gives_every_text_back(tiny, text):
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    assert tiny.token_to_id("<unk>") not in ids
    assert tiny.decode(tiny.encode_plain(text)) == text
    assert all(id < tiny.vocab_size for id in ids)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_qwen_splits_at_added_tokens_as_the_library_does(qwen, text):
    # A plain range at the very end takes the way around added tokens; without one the library does it all.
    whole, whole_offsets = qwen.encode_with_offsets(text)
    around, around_offsets = qwen.encode_with_offsets(text, [(len(text), len(text))])
    assert whole == qwen.encode(text) == around
    assert whole_offsets == around_offsets


def test_tiny_tokens_are_characters_pieces_and_bytes(tiny):
    tokens = [tiny.id_to_token(id) for id in tiny.encode("What is the total, user?é")]
    assert tokens == ["What is the ", *"total, ", "user", "?", "<0xC3>", "<0xA9>"]
    assert tiny.vocab_size <= 400


def test_half_a_surrogate_pair_is_refused(tiny):
    with pytest.raises(ValueError, match="surrogate pair at character 1"):
        tiny.encode("a\ud800b")
    with pytest.raises(TypeError, match="expected a text, found bytes"):
        tiny.encode(b"a")


# --- arrays and batches ---


def test_arrays(tiny):
    import jax

    ids = tiny.encode("abc")
    as_numpy, as_jax = tiny.encode("abc", return_tensors="np"), tiny.encode("abc", return_tensors="jax")
    assert as_numpy.dtype == as_jax.dtype == np.int32
    assert as_numpy.tolist() == as_jax.tolist() == [ids]
    assert isinstance(as_jax, jax.Array) and isinstance(as_numpy, np.ndarray)
    assert tiny.decode(as_numpy[0]) == tiny.decode(as_jax[0]) == "abc"
    with pytest.raises(ValueError, match=r"shape \(1, 3\): use batch_decode"):
        tiny.decode(as_numpy)
    with pytest.raises(ValueError, match="from -100"):
        tiny.decode([-100, 5])
    with pytest.raises(ValueError, match='"np" or "jax", found \'pt\''):
        tiny.encode("abc", return_tensors="pt")


def test_batches(tiny):
    rows = tiny.batch_encode(["abc", "", "ab"])
    assert rows == [tiny.encode("abc"), [], tiny.encode("ab")]
    array = tiny.batch_encode(["abc", "", "ab"], return_tensors="np")
    pad = tiny.pad_token_id
    assert array.tolist() == [rows[0], [pad] * 3, [*rows[2], pad]]
    assert tiny.batch_decode(array, skip_special_tokens=True) == ["abc", "", "ab"]
    assert tiny.batch_encode([], return_tensors="np").shape == (0, 0)


# --- files ---


@pytest.mark.parametrize("name", ["qwen_folder", "tiny_folder", "sentencepiece_model"])
def test_saving_carries_the_files_unchanged(name, request, tmp_path):
    source = request.getfixturevalue(name)
    VishwamAITokenizer.from_pretrained(source).save_pretrained(tmp_path / "run" / "tokenizer")
    names = [path.name for path in (tmp_path / "run" / "tokenizer").iterdir()]
    assert filecmp.cmpfiles(source, tmp_path / "run" / "tokenizer", names, shallow=False) == (names, [], [])
    again = VishwamAITokenizer.from_pretrained(tmp_path / "run")  # a run's folder
    again.save_pretrained(again.folder)  # onto itself
    assert again.encode("hello <|im_end|>") == VishwamAITokenizer.from_pretrained(source).encode("hello <|im_end|>")


def test_a_template_of_its_own_file_wins(tiny_folder, tmp_path):
    VishwamAITokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert VishwamAITokenizer.from_pretrained(tmp_path).chat_template == "own file"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    config["eos_token"] = {"content": "<|endoftext|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = VishwamAITokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == "d"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.token_to_id("<|endoftext|>")
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = VishwamAITokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template is tokenizer.eos_token_id is None
    with pytest.raises(ValueError, match="rows of 1 to 2 tokens need padding"):
        tokenizer.batch_encode(["a", "ab"], return_tensors="np")


def test_a_stored_length_does_not_cut(tiny_folder, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(VishwamAITokenizer.from_pretrained(tmp_path).encode("abcdefg")) == 7


@pytest.mark.parametrize("name", ["tiny", "qwen"])
def test_pickles_for_data_workers(name, request):
    tokenizer = request.getfixturevalue(name)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("total <|im_end|>") == tokenizer.encode("total <|im_end|>")


def test_errors_of_files(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*nowhere: looked for .*found no such folder"):
        VishwamAITokenizer.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match="found vocab.txt"):
        VishwamAITokenizer.from_pretrained(tmp_path)
    (tmp_path / "a.model").write_bytes(b"\xff\xff no model")
    with pytest.raises(ValueError, match="a.model is not a SentencePiece model"):
        VishwamAITokenizer.from_pretrained(tmp_path)
    (tmp_path / "b.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several SentencePiece models \(a.model, b.model\)"):
        VishwamAITokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        VishwamAITokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        VishwamAITokenizer.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match="no token '<image>'"):
        tiny.token_to_id("<image>")
    with pytest.raises(KeyError, match=f"no id {tiny.vocab_size}: its ids are 0 to {tiny.vocab_size - 1}"):
        tiny.id_to_token(tiny.vocab_size)
    with pytest.raises(KeyError, match="no id -1"):
        tiny.id_to_token(-1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token": "<pad!>"}, r"names the token '<pad!>' \(id None\), the vocabulary has none such"),
        ({"added_tokens_decoder": {"400": {"content": "<new>"}}}, r"'<new>' \(id 400\), the vocabulary has none such"),
        ({"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}, r"'<\|im_end\|>' \(id 7\), .* has it as id \d+"),
    ],
)
@pytest.mark.parametrize("name", ["tiny_folder", "sentencepiece_model"])
def test_tokens_that_only_the_config_names_are_an_error(name, config, message, request, tmp_path):
    VishwamAITokenizer.from_pretrained(request.getfixturevalue(name)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        VishwamAITokenizer.from_pretrained(tmp_path)


def test_the_tiny_tokenizer_in_configs_is_what_the_code_builds(tmp_path):
    build_tiny_tokenizer(ALPHABET, PIECES, load_template("qwen3"), tmp_path)
    committed = Path(__file__).parents[2] / "configs" / "tokenizers" / "parsit_tiny"
    names = sorted(path.name for path in committed.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    assert filecmp.cmpfiles(committed, tmp_path, names, shallow=False) == (names, [], [])
    assert sum(path.stat().st_size for path in committed.iterdir()) < 100_000


def test_tiny_refuses_doubled_and_single_character_pieces(tmp_path):
    with pytest.raises(ValueError, match=r"twice: \['a'\]"):
        build_tiny_tokenizer("aba", [], "", tmp_path)
    with pytest.raises(ValueError, match=r"two or more characters, found \['c'\]"):
        build_tiny_tokenizer("ab", ["c"], "", tmp_path)


# --- SentencePiece ---


def test_sentencepiece_ids_are_its_own(sentencepiece_model):
    ours = VishwamAITokenizer.from_pretrained(sentencepiece_model)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model / "tokenizer.model"))
    assert ours.vocab_size == theirs.get_piece_size()
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 3)
    for text in [
        "the quick fox",
        "  two  spaces ",
        "héllo 🦄\nworld",
        "hello <|im_end|> world<|im_end|>there",
        "",
    ]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text == theirs.decode(theirs.encode(text)), text
    assert ours.token_to_id("▁the") == theirs.piece_to_id("▁the")
    with pytest.raises(KeyError):
        ours.token_to_id("nonsense")


def test_sentencepiece_symbols(sentencepiece_model):
    tokenizer = VishwamAITokenizer.from_pretrained(sentencepiece_model)
    assert set(tokenizer.added_tokens) == {
        "<s>",
        "</s>",
        "<pad>",
        "<|image_pad|>",
        "<|im_start|>",
        "<|im_end|>",
    }
    text = "<s> hello<|image_pad|><|image_pad|>the <|im_end|> fox</s>"
    ids = tokenizer.encode(text)
    assert [tokenizer.id_to_token(id) for id in ids if tokenizer.id_to_token(id) in tokenizer.added_tokens] == [
        "<s>",
        "<|image_pad|>",
        "<|image_pad|>",
        "<|im_end|>",
        "</s>",
    ]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == " hellothe  fox"
    added = {token.id for token in tokenizer.added_tokens.values()}
    plain = tokenizer.encode_plain(text)
    assert not added & set(plain) and tokenizer.decode(plain) == text


def test_sentencepiece_adds_what_the_config_says(sentencepiece_model, tmp_path):
    VishwamAITokenizer.from_pretrained(sentencepiece_model).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "add_eos_token": true}')
    tokenizer = VishwamAITokenizer.from_pretrained(tmp_path)
    inner = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [1, *inner, 2]
    ids, offsets = tokenizer.encode_with_offsets("a fox<|im_end|>", [])
    assert len(ids) == len(offsets) and offsets[-1] == (5, 15)
