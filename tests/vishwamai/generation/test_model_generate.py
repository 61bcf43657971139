"""`VishwamAI.generate` and `stream`: what a user calls."""

import json
import shutil
from copy import copy
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import quick_and_slow
from hf_folders import write_folder

from vishwamai import VishwamAI
from vishwamai.cli import main
from vishwamai.config import ConfigError
from vishwamai.convert.from_hf import from_hf
from vishwamai.models.config import TextConfig

TOKENIZER = Path(__file__).parents[3] / "configs" / "tokenizers" / "parsit_tiny"
CONFIG = TextConfig(
    vocab_size=389, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=96, tie_word_embeddings=False,
)  # fmt: skip
PROMPTS = [[40, 41, 42, 43, 44], [50, 51], [60]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_folder(folder, "qwen3", CONFIG, dtype="float32")
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 388]}))
    return VishwamAI.from_pretrained(folder)


def test_lists_and_left_padded_arrays_give_the_same_with_the_prompt_in_front(model):
    got = model.generate(PROMPTS, max_new_tokens=9, stop=[])
    assert got.shape == (3, 14) and got.dtype == np.int32
    padded = np.array([[40, 41, 42, 43, 44], [7, 7, 7, 50, 51], [7, 7, 7, 7, 60]])
    mask = np.array([[1] * 5, [0] * 3 + [1] * 2, [0] * 4 + [1]])
    again = model.generate(padded, mask, max_length=14, stop=[])
    np.testing.assert_array_equal(again, got)
    np.testing.assert_array_equal(got[:, :5], np.where(mask, padded, model.pad_id))
    alone = [model.generate([prompt], max_new_tokens=9, stop=[])[0, len(prompt) :] for prompt in PROMPTS]
    np.testing.assert_array_equal(got[:, 5:], alone)
    assert min(len(set(row)) for row in got[:, 5:].tolist()) > 3


def test_several_samples_share_a_prompt(model):
    options = dict(max_new_tokens=12, stop=[], temperature=1.0, num_return_sequences=3)
    got = model.generate(PROMPTS[:2], seed=1, **options)
    assert got.shape == (6, 17)
    assert len({tuple(row) for row in got.tolist()}) == 6
    np.testing.assert_array_equal(got, model.generate(PROMPTS[:2], seed=1, **options))
    assert (got != model.generate(PROMPTS[:2], seed=2, **options)).any()
    greedy = model.generate(PROMPTS[:2], num_return_sequences=3, max_new_tokens=12, stop=[])
    np.testing.assert_array_equal(greedy, model.generate(PROMPTS[:2], max_new_tokens=12, stop=[]).repeat(3, axis=0))


def test_a_row_stops_at_the_checkpoints_end_or_at_what_it_is_told(model):
    free = model.generate(PROMPTS[:2], max_new_tokens=20, stop=[])[:, 5:]
    end = int(free[0, 6])
    got = model.generate(PROMPTS[:2], max_new_tokens=20, stop=[end])[:, 5:]
    first = free[0].tolist().index(end)
    assert got[0].tolist()[: first + 1] == free[0, : first + 1].tolist()
    assert (got[0, first + 1 :] == model.pad_id).all()
    assert model.end_ids == [5, 388]
    model.__dict__["end_ids"] = [end]  # as if the checkpoint said so
    try:
        np.testing.assert_array_equal(model.generate(PROMPTS[:2], max_new_tokens=20)[:, 5:], got)
    finally:
        del model.__dict__["end_ids"]


def test_a_converted_run_ends_where_its_source_does(model, tmp_path):
    from_hf(model.folder, tmp_path / "run")
    assert VishwamAI.from_pretrained(tmp_path / "run").end_ids == [5, 388]


@pytest.mark.parametrize("text, message", [("{", "is not valid JSON"), ("[1]", "holds list, expected an object")])
def test_a_broken_generation_config_is_named(model, tmp_path, text, message):
    folder = tmp_path / "broken"
    shutil.copytree(model.folder, folder)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"generation_config.json {message}"):
        VishwamAI.from_pretrained(folder).generate([[3]], max_new_tokens=2)


def test_a_row_stops_where_its_text_holds_a_string(model):
    free = model.generate(PROMPTS, max_new_tokens=40, stop=[])[:, 5:]
    decode = model.tokenizer.decode
    string = decode(free[0, 17:20])
    assert len(string) >= 2
    got = model.generate(PROMPTS, max_new_tokens=40, stop=[string])[:, 5:]
    lengths = []
    for row, whole in zip(got, free, strict=True):
        stops = [n for n in range(1, 41) if string in decode(whole[:n])]
        lengths.append(stops[0] if stops else 40)
        kept = whole[: lengths[-1]].tolist()
        assert row.tolist() == kept + [model.pad_id] * (got.shape[1] - len(kept))
    assert lengths[0] <= 20 and got.shape[1] == max(lengths)


def test_a_stream_is_what_generate_gives_piece_by_piece(model):
    whole = model.generate(PROMPTS[:1], max_new_tokens=40, stop=[])[0, 5:]
    pieces = list(model.stream(PROMPTS[:1], max_new_tokens=40, stop=[]))
    assert [len(piece) for piece in pieces] == [16, 16, 8]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    end = int(whole[20])
    if end not in whole[:20]:
        pieces = list(model.stream(PROMPTS[:1], max_new_tokens=40, stop=[end]))
        np.testing.assert_array_equal(np.concatenate(pieces), whole[:21])


def exact(model, prompt, answer):
    """Log-probabilities of an answer's tokens by the whole text."""
    logits = model([[*prompt, *answer]])[0, len(prompt) - 1 : -1]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(answer)), answer]


DRAWN = dict(temperature=1.5, top_k=20, repetition_penalty=1.5, num_return_sequences=2)


@pytest.mark.parametrize("options", quick_and_slow({"greedy": {}, "drawn": DRAWN}, ["greedy"]))
def test_log_probabilities_are_those_of_the_whole_text(model, options):
    """The model's own: not of what temperature, top_k and a penalty make of them."""
    tokens = model.generate(PROMPTS, max_new_tokens=20, stop=[], **options)
    end = int(tokens[0, 5 + 6])
    ends = dict(max_new_tokens=20, stop=[end], **options)
    got = model.generate(PROMPTS, return_log_probabilities=True, **ends)
    np.testing.assert_array_equal(got.tokens, model.generate(PROMPTS, **ends))
    assert got.log_probabilities.dtype == np.float32
    assert got.log_probabilities.shape == (len(tokens), got.tokens.shape[1] - 5)
    lengths = []
    for row, answer, found in zip(range(len(tokens)), got.tokens[:, 5:], got.log_probabilities, strict=True):
        length = answer.tolist().index(end) + 1 if end in answer else len(answer)
        prompt = PROMPTS[row * 3 // len(tokens)]
        np.testing.assert_allclose(found[:length], exact(model, prompt, answer[:length]), atol=1e-4)
        assert (found[length:] == 0).all() and (found[:length] < 0).all()
        lengths.append(length)
    assert min(lengths) <= 7 < max(lengths)


def test_log_probabilities_end_where_a_string_does(model):
    free = model.generate(PROMPTS[:1], max_new_tokens=40, stop=[], return_log_probabilities=True)
    string = model.tokenizer.decode(free.tokens[0, 22:25])
    got = model.generate(PROMPTS[:2], max_new_tokens=40, stop=[string], return_log_probabilities=True)
    length = np.count_nonzero(got.log_probabilities[0])
    assert 1 < length <= 20 < got.log_probabilities.shape[1]
    np.testing.assert_allclose(got.log_probabilities[0, :length], free.log_probabilities[0, :length], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("right", ["always", "sometimes"])
def test_a_draft_changes_nothing_but_the_time(model, right):
    """Strings and ends within what was accepted, pieces of a stream, log-probabilities."""
    draft = copy(model)
    if right == "sometimes":
        noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(model.parameters))))
        change = lambda x: x + 0.3 * x.std() * jax.random.normal(next(noise), x.shape)  # noqa: E731
        draft.parameters = jax.tree.map(change, model.parameters)
    free = model.generate(PROMPTS, max_new_tokens=40, stop=[])[:, 5:]
    stop = [model.tokenizer.decode(free[0, 17:20]), int(free[1, 7])]
    for options in (dict(stop=stop), dict(stop=[]), dict(stop=stop, temperature=1.0, num_return_sequences=2)):
        options = dict(max_new_tokens=40, return_log_probabilities=True, **options)
        plain = model.generate(PROMPTS, **options)
        got = model.generate(PROMPTS, draft=draft, draft_tokens=3, **options)
        np.testing.assert_array_equal(got.tokens, plain.tokens)
        np.testing.assert_allclose(got.log_probabilities, plain.log_probabilities, atol=1e-4)
    pieces = list(model.stream(PROMPTS[:1], max_new_tokens=40, stop=[], draft=draft, draft_tokens=3))
    assert [len(piece) for piece in pieces] == [16, 16, 8]
    np.testing.assert_array_equal(np.concatenate(pieces), free[0])


def test_a_draft_of_another_vocabulary(model, tmp_path):
    write_folder(tmp_path, "qwen3", CONFIG.model_copy(update={"vocab_size": 390}), dtype="float32")
    with pytest.raises(ValueError, match="the draft has a vocabulary of 390 tokens, the model of 389"):
        model.generate(PROMPTS, max_new_tokens=40, draft=VishwamAI.from_pretrained(tmp_path))


def test_a_penalty_reaches_prompt_and_answer(model):
    plain = model.generate(PROMPTS[:1], max_new_tokens=60, stop=[])[0]
    varied = model.generate(PROMPTS[:1], max_new_tokens=60, stop=[], repetition_penalty=50.0)[0]
    assert len(set(varied.tolist())) == 65 > len(set(plain.tolist()))  # no token twice, and none of the prompt


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[3], []], {}, "prompt 1 is empty"),
        ([], {}, "there is no prompt"),
        ([[3, -1]], {}, "holds -1; the vocabulary's ids are 0 to 388"),
        ([[3] * 97], {}, "the longest prompt has 97 tokens and max_new_tokens is 1, the context holds 96"),
        ([[3, 389]], {}, "holds 389; the vocabulary's ids are 0 to 388"),
        ([[3]], dict(max_new_tokens=96), "the context holds 96"),
        ([[3, 4]], dict(max_length=2), "max_length=2 leaves no room behind a prompt of 2 tokens"),
        ([[3]], dict(max_length=9, max_new_tokens=3), "both given"),
        ([[3]], dict(max_new_tokens=0), "max_new_tokens=0: expected at least 1"),
        ([[3]], dict(stop=[""]), "stop holds ''"),
        ([[3]], dict(stop=[2.5]), "stop holds 2.5"),
        ([[3]], dict(num_return_sequences=0), "samples of a prompt=0"),
        ([[3]], dict(top_p=2.0), "top_p=2.0"),
    ],
)
def test_what_can_not_be_continued(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **options)


def test_a_stream_has_one_row(model):
    with pytest.raises(ValueError, match="a stream has one row, found 3 prompts"):
        model.stream(PROMPTS)


def test_the_command_prints_what_generate_gives(model, capsys):
    call = ["generate", "--checkpoint", str(model.folder), "--prompt", "Total: ", "--max-new-tokens", "40"]
    ids = model.tokenizer.encode("Total: ")
    expected = model.tokenizer.decode(model.generate([ids], max_new_tokens=40)[0, len(ids) :], skip_special_tokens=True)
    assert main(call) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main([*call, "--stream"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main([*call, "--stream", "--stop", expected[3:5]]) == 0
    assert len(capsys.readouterr().out) < len(expected)
    assert main([*call, "--draft", str(model.folder)]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main([*call, "--chat", "--temperature", "1", "--seed", "4"]) == 0
    assert capsys.readouterr().out not in ("", expected + "\n")


@pytest.mark.parametrize(
    "change, message",
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--max-new-tokens", "500"], "the context holds 96"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--draft", "nowhere"], "nowhere"),
        (["--cache-dtype", "int4"], "cache_dtype='int4': expected int8"),
    ],
)
def test_the_command_says_what_is_wrong(model, capsys, change, message):
    assert main(["generate", "--checkpoint", str(model.folder), "--prompt", "Total", *change]) == 1
    assert message in capsys.readouterr().err
