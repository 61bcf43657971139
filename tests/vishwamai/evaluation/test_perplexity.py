"""Perplexity by windows: each token once, numbers of a model that is known, and Transformers' own."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vishwamai import VishwamAI
from vishwamai.config import ConfigError
from vishwamai.data.sources import DataError
from vishwamai.evaluation.perplexity import perplexity, windows

VOCAB, CONTEXT = 389, 48
DOCUMENTS = [
    "The total of this invoice is 12.50, payable within 30 days.",
    "Who signed? " * 40,
    "é ☃ 漢字\n\nTwo lines.",
    "x",
]


@given(st.integers(0, 200), st.integers(1, 50), st.data())
@example(1, 7, None)
@example(7, 7, None)
@example(8, 7, None)
@example(9, 7, None)
def test_windows_predict_each_token_once_with_the_context_that_the_stride_leaves(length, context, data):
    stride = data.draw(st.integers(1, context)) if data else context
    predicted = []
    for start, end, scored in windows(length, context, stride):
        assert 0 <= start < end - scored and end <= length  # something stands before each
        assert end - start <= context + 1
        for token in range(end - scored, end):
            assert token - start >= min(token, context - stride + 1)
        predicted += range(end - scored, end)
    assert predicted == list(range(1, length))


@pytest.mark.parametrize("stride", [0, 8, -1])
def test_a_stride_that_leaves_gaps(stride):
    with pytest.raises(ValueError, match=f"stride={stride}: expected 1 to the context, 7"):
        list(windows(20, 7, stride))


@pytest.mark.parametrize("stride", [None, 1, CONTEXT])
def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(uniform, stride):
    found = perplexity(uniform, DOCUMENTS, stride=stride, batch_size=5)
    tokens = sum(len(uniform.tokenizer.encode_plain(document)) for document in DOCUMENTS)
    words, size = 11 + 80 + 5 + 1, sum(len(document.encode()) for document in DOCUMENTS)
    assert (found.documents, found.tokens, found.words, found.bytes) == (4, tokens, words, size)
    assert (found.empty_documents, found.context, found.stride) == (0, CONTEXT, stride or CONTEXT // 2)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(VOCAB) / size, rel=1e-5)
    assert found.word_perplexity == pytest.approx(math.exp(tokens * math.log(VOCAB) / words), rel=1e-4)


def test_documents_do_not_see_each_other_and_progress_ends_at_the_end(model):
    seen = []
    together = perplexity(model, DOCUMENTS, on_progress=lambda done, total: seen.append((done, total)), batch_size=3)
    assert seen[-1][0] == seen[-1][1] > 4
    apart = [perplexity(model, [document]) for document in reversed(DOCUMENTS)]
    nats = sum(found.tokens * math.log(found.perplexity) for found in apart)
    assert together.perplexity == pytest.approx(math.exp(nats / sum(found.tokens for found in apart)), rel=1e-5)


def test_empty_documents_are_counted_and_left_out(model, caplog):
    wanted = perplexity(model, ["a b", "c"])
    with caplog.at_level(logging.WARNING):
        found = perplexity(model, ["", "a b", "", "c"])
    assert caplog.messages == ["2 of 4 documents are empty and were left out"]
    assert found.empty_documents == 2 and found.documents == 2
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-6)
    with pytest.raises(DataError, match="nothing to score: 2 documents, all of them empty"):
        perplexity(model, ["", ""])


def test_a_text_without_words_has_no_word_perplexity(model, uniform):
    assert perplexity(model, [" \n "]).word_perplexity is None
    assert perplexity(uniform, ["x7" * 300]).word_perplexity is None  # exp(1,800 or more) is no float


def test_a_model_beyond_all_numbers_has_no_perplexity(model):
    kernel = model.parameters["lm_head"]["kernel"]
    model.parameters["lm_head"]["kernel"] = kernel.replace(kernel.get_value() * 1e4)
    found = perplexity(model, DOCUMENTS)
    assert found.perplexity is found.word_perplexity is None
    assert found.bits_per_byte > 700 / math.log(2)


def changed_tokenizer(model, folder, **changes) -> VishwamAI:
    shutil.copytree(model.folder, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return VishwamAI.from_pretrained(folder)


def test_the_first_token_is_predicted_from_bos_else_eos_else_not_at_all(model, tmp_path):
    text = "Total: 12"
    ids = model.tokenizer.encode_plain(text)
    for name, changes, before in [
        ("eos", {}, [model.tokenizer.eos_token_id]),
        ("bos", {"bos_token": "<|im_start|>"}, [model.tokenizer.token_to_id("<|im_start|>")]),
        ("none", {"bos_token": None, "eos_token": None}, []),
    ]:
        changed = changed_tokenizer(model, tmp_path / name, **changes)
        tokens = np.array([before + ids])
        logits = np.asarray(model(tokens), np.float64)[0, :-1]
        picked = logits[np.arange(len(logits)), tokens[0, 1:]] - np.log(np.exp(logits).sum(axis=-1))
        found = perplexity(changed, [text])
        assert found.tokens == len(picked) and found.bytes == len(text)
        assert found.perplexity == pytest.approx(math.exp(-picked.mean()), rel=1e-4)
    assert perplexity(changed, ["", "x", text]).empty_documents == 2  # a single token has nothing before it


def test_special_tokens_in_a_document_are_ordinary_text(model):
    assert perplexity(model, ["a<|im_end|>"]).tokens > len(model.tokenizer.encode("a<|im_end|>")) == 2


def test_a_tokenizer_that_is_larger_than_the_model_is_an_error(model):
    model.config = model.config.model_copy(update={"vocab_size": 300})
    with pytest.raises(ConfigError, match="has 389 ids, the model's vocab_size is 300"):
        perplexity(model, ["a"])


@pytest.mark.parametrize("stride", [5, 24, 48])
def test_perplexity_equals_transformers(stride, model, tmp_path):
    from parity import decoder, saved, torch

    theirs = decoder(vocab_size=VOCAB, max_position_embeddings=CONTEXT)
    folder = saved(theirs, tmp_path)
    model.tokenizer.save_pretrained(folder)
    ours = VishwamAI.from_pretrained(folder)
    nats, count = 0.0, 0
    for document in DOCUMENTS:
        ids = [ours.tokenizer.eos_token_id, *ours.tokenizer.encode_plain(document)]
        end = 1
        while end < len(ids):  # as in the Transformers documentation, the labels of the context being -100
            before, end = end, min(len(ids), end + (stride if end > 1 else CONTEXT))
            window = torch.tensor([ids[max(0, end - CONTEXT - 1) : end]])
            labels = window.clone()
            labels[:, : before - end] = -100
            with torch.no_grad():
                nats += float(theirs(window, labels=labels).loss) * (end - before)
        count += len(ids) - 1
    found = perplexity(ours, DOCUMENTS, stride=stride)
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
