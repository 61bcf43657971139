"""The lm_eval adapter against lm_eval's own model of Transformers, on the same weights and on local tasks."""

import json
import string
import subprocess
import sys

import numpy as np
import pytest
import yaml

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -e .[lm_eval]")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from vishwamai.chat_template import ConversationError  # noqa: E402
from vishwamai.config import ConfigError  # noqa: E402
from vishwamai.evaluation.harness import HarnessModel  # noqa: E402
from vishwamai.evaluation.perplexity import windows  # noqa: E402

CONTEXT = 96
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who signed?"},
    {"role": "assistant", "content": "I think "},
]
TRIMS = "{% for message in messages %}{{ message.content | trim }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_folder):
    """A model that Transformers opens too, and that says different things."""
    from parity import decoder, saved, wakeful

    folder = tmp_path_factory.mktemp("harness")
    theirs = wakeful(decoder(vocab_size=389, max_position_embeddings=CONTEXT, seed=3))
    theirs.generation_config.eos_token_id = [388, 61]
    saved(theirs, folder)
    for path in text_folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> HarnessModel:
    return HarnessModel(str(folder), batch_size=4)


@pytest.fixture(scope="module")
def theirs(folder):
    return own_model(folder, batch_size=4)


def own_model(folder, **options):
    huggingface = pytest.importorskip(
        "lm_eval.models.huggingface", reason="lm_eval's own model needs PyTorch and accelerate: pip install lm_eval[hf]"
    )
    return huggingface.HFLM(str(folder), device="cpu", dtype="float32", **options)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


PAIRS = [
    ("Question: who signed?\nAnswer:", " Ms Brown"),
    ("Question: who signed?\nAnswer:", " nobody"),
    ("Question: who signed?\nAnswer:", " n"),
    ("", "Total: 12.50"),
    ("Total: ", "12.50"),  # the space belongs to what is scored
    ("The total of this invoice is 12.50. " * 9, "It is payable within 30 days."),  # longer than the context
    ("<|im_start|>user\nHi<|im_end|>\n", "a"),
    ("<|im_end|>", "a"),
]


def test_loglikelihoods_are_those_of_lm_evals_own_model(ours, theirs, caplog):
    wanted = theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    caplog.clear()  # what theirs says
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert_same(found, wanted)
    (cut,) = caplog.messages
    assert cut.endswith(f"tokens of a context are left out on the left: it holds {CONTEXT}")


def test_what_is_greedy_is_so_for_lm_evals_own_model(ours, theirs):
    pairs = [(f"{number}:", character) for number in range(12) for character in string.printable]
    wanted = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert_same(found, wanted)
    assert 0 < sum(greedy for _, greedy in found) <= 12


def assert_same(found, wanted):
    np.testing.assert_allclose([each[0] for each in found], [each[0] for each in wanted], atol=1e-3)
    assert [each[1] for each in found] == [each[1] for each in wanted]


def test_rolling_loglikelihoods_are_those_of_lm_evals_own_model(ours, theirs):
    texts = [("Who signed? " * count + "é",) for count in (1, 9, 40)] + [("",), ("x",)]
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert found[3] == 0 > found[4]


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 20, 21, 22])
@pytest.mark.parametrize("kept", [1, 3, 7])
def test_windows_are_lm_evals(length, kept):
    tokens = list(range(100, 100 + length))
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 5, 7, kept))
    ids = [5, *tokens]
    ours = (
        (ids[start : end - scored], ids[end - scored : end]) for start, end, scored in windows(length + 1, 7, 8 - kept)
    )
    assert list(ours) == list(theirs)


def test_answers_are_those_of_lm_evals_own_model(ours, theirs):
    prompts = [*(context for context, _ in PAIRS if context), "a", "b\n"]
    free = [(prompt, {"until": [], "max_gen_toks": 40}) for prompt in prompts]
    whole = ours.generate_until(requests("generate_until", *free), disable_tqdm=True)
    assert whole == theirs.generate_until(requests("generate_until", *free), disable_tqdm=True)
    assert len(set(whole)) > 5 and max(map(len, whole)) > 20
    stop = [whole[0][4:6], whole[-1][9:10], ""]
    stopped = [(prompt, {"until": stop, "max_gen_toks": 40, "do_sample": False}) for prompt in prompts]
    found = ours.generate_until(requests("generate_until", *stopped), disable_tqdm=True)
    assert found == [min((text.split(each)[0] for each in stop[:2]), key=len) for text in whole]
    stopped = [(prompt, {**options, "until": stop[:2]}) for prompt, options in stopped]
    assert found == theirs.generate_until(requests("generate_until", *stopped), disable_tqdm=True)


@pytest.mark.slow
def test_drawn_answers_differ_also_between_batches(ours):
    def answers(**options):
        asked = [("a", {"until": [], "max_gen_toks": 12, "do_sample": True, **options})] * 10
        return ours.generate_until(requests("generate_until", *asked), disable_tqdm=True)

    assert len(set(answers())) == 10  # the temperature is 1 where none is given
    assert answers(temperature=0.7, top_p=0.9) == answers(temperature=0.7, top_p=0.9) != answers(temperature=0.7)
    assert answers(seed=7) != answers()
    assert len(set(answers(temperature=0.0))) == len(set(answers(do_sample=False, temperature=0.7))) == 1


def test_a_quantised_cache_answers_nearly_the_same(folder, ours):
    """As far as a model can whose words are about as likely as each other."""
    quantised = HarnessModel(str(folder), batch_size=4, cache_dtype="int8")
    asked = requests("generate_until", *((f"{number}:", {"until": [], "max_gen_toks": 12}) for number in range(8)))
    whole, found = (model.generate_until(asked, disable_tqdm=True) for model in (ours, quantised))
    assert [text[0] for text in found] == [text[0] for text in whole]  # a prompt is read as it was computed
    assert 3 <= sum(a == b for a, b in zip(whole, found, strict=True)) < 8


def test_conversations_are_written_as_transformers_does(ours, theirs):
    for chat, prompt in [(CHAT[:2], True), (CHAT, False), (CHAT[1:2], True)]:
        assert ours.apply_chat_template(chat, prompt) == theirs.apply_chat_template(chat, prompt)
    ours.tokenizer.chat_template, kept = TRIMS, ours.tokenizer.chat_template
    assert ours.apply_chat_template(CHAT, False) == "Be brief.\nWho signed?\nI think"
    ours.tokenizer.chat_template = kept
    thoughtless = HarnessModel(str(ours.model.folder), chat_template_args={"enable_thinking": False})
    assert thoughtless.apply_chat_template(CHAT[:2]).endswith("</think>\n\n")
    assert ours.chat_template(True) == theirs.chat_template(True) == ours.tokenizer.chat_template
    assert ours.tokenizer_name == str(ours.tokenizer.folder).replace("/", "__")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three local tasks, one for each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "text": "Who signed? Ms Brown. " * 7,
            "question": f"{one} + {two} =",
            "choices": ["3", "5", "7"],
            "answer": two,
        }
        for one, two in [(3, 0), (4, 1), (5, 2), (1, 2)]
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    kinds = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "local_answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["!", "\n"], "max_gen_toks": 20, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **kind}))
    return folder


def evaluated(model, tasks, **options):
    return lm_eval.simple_evaluate(
        model=model,
        tasks=["local_choice", "local_rolling", "local_answer"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


@pytest.mark.slow
def test_local_tasks_give_what_lm_evals_own_model_gives(ours, theirs, tasks, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found, wanted = evaluated(ours, tasks), evaluated(theirs, tasks)
    for task, metrics in wanted["results"].items():
        assert found["results"][task].keys() == metrics.keys()
        for metric, value in metrics.items():
            assert found["results"][task][metric] == (
                pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            )
        for mine, other in zip(found["samples"][task], wanted["samples"][task], strict=True):
            if task == "local_answer":
                assert mine["filtered_resps"] == other["filtered_resps"]
    assert found["results"]["local_rolling"]["bits_per_byte,none"] > 1
    chat = evaluated(ours, tasks, apply_chat_template=True, limit=1)
    assert chat["samples"]["local_answer"][0]["arguments"][0][0].startswith("<|im_start|>user\n3 + 0")


@pytest.mark.slow
def test_the_command_line_is_lm_evals(folder, tasks, tmp_path):
    call = ["--model", "vishwamai", "--model_args", f"pretrained={folder},dtype=bfloat16", "--tasks", "local_choice"]
    more = ["--include_path", str(tasks), "--batch_size", "2", "--output_path", str(tmp_path), "--limit", "2"]
    command = [sys.executable, "-m", "vishwamai.evaluation.harness", *call, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|local_choice|" in done.stdout
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local_choice"]["acc,none"] in (0, 0.5, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size="auto"), "batch_size=auto: expected a number from 1"),
        (dict(batch_size=0), "batch_size=0: expected a number from 1"),
        (dict(max_length=97), "max_length=97: expected 2 to the model's context, 96"),
        (dict(max_length=1), "max_length=1: expected 2"),
        (dict(cache_dtype="int4"), "cache_dtype='int4': expected int8, float8_e4m3fn, or None"),
    ],
)
def test_options_out_of_range(folder, options, message):
    with pytest.raises(ValueError, match=message):
        HarnessModel(str(folder), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "the task asks for num_beams; what can be asked for: until, "),
        ({"max_gen_toks": 96}, "max_gen_toks=96 leaves no room for a prompt, the context holds 96"),
    ],
)
def test_answers_that_can_not_be_given(ours, options, message):
    with pytest.raises(ValueError, match=message):
        ours.generate_until(requests("generate_until", ("a", {"until": [], **options})), disable_tqdm=True)


def test_long_prompts_lose_their_beginning_aloud(ours, caplog):
    prompt = "Who signed? " * 40
    ids = ours.tok_encode(prompt)
    short = ours.tokenizer.decode(ids[-(CONTEXT - 8) :])
    assert ours.tok_encode(short) == ids[-(CONTEXT - 8) :]
    asked = [(text, {"until": [], "max_gen_toks": 8}) for text in (prompt, short, "")]
    cut, whole, _ = ours.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert cut == whole
    assert caplog.messages == [
        f"of a prompt of {len(ids)} tokens only the last {CONTEXT - 8} are read, for want of room"
    ]


def test_continuations_that_can_not_be_scored(ours):
    assert ours.loglikelihood(requests("loglikelihood", ("a", "")), disable_tqdm=True) == [(0.0, True)]
    with pytest.raises(ValueError, match="a continuation has .* tokens, the context holds 96: ' Who signed"):
        ours.loglikelihood(requests("loglikelihood", ("a", " Who signed?" * 40)), disable_tqdm=True)
    with pytest.raises(ValueError, match="folds '<|im_end|>' into what stands before it"):
        ours.loglikelihood(requests("loglikelihood", ("", "<|im_end|>")), disable_tqdm=True)


def test_a_context_of_spaces_is_an_empty_one(ours):
    spaces, empty = ours.loglikelihood(requests("loglikelihood", ("  ", "12"), ("", "  12")), disable_tqdm=True)
    assert spaces == pytest.approx(empty, abs=1e-4)


def changed(folder, copy, without=(), adds_bos=False):
    """The model with another tokenizer: some keys of its config left out, or one that begins each text."""
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in without}
    if adds_bos:
        config["bos_token"] = "<|endoftext|>"
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (id,) = [token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|endoftext|>"]
        bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [id], "tokens": ["<|endoftext|>"]}},
        }
        (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return str(copy)


def test_a_tokenizer_that_begins_texts_does_so_once(folder, tmp_path):
    place = changed(folder, tmp_path, adds_bos=True)
    # Their cache takes the wrong logits where pairs of unequal continuations make one text, as two of these now do.
    ours, theirs = HarnessModel(place), own_model(place, batch_size=1, logits_cache=False)
    assert ours.prefix_token_id == theirs.prefix_token_id != ours.eot_token_id == theirs.eot_token_id
    begun = "<|endoftext|>Who"
    assert ours.tok_encode("Who") == ours.tok_encode(begun) == theirs.tok_encode(begun)
    pairs = requests("loglikelihood", *PAIRS, (begun, " signed?"))
    assert_same(ours.loglikelihood(pairs, disable_tqdm=True), theirs.loglikelihood(pairs, disable_tqdm=True))
    texts = requests("loglikelihood_rolling", ("Who signed? " * 9,), (begun,))
    found = ours.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(found, theirs.loglikelihood_rolling(texts, disable_tqdm=True), atol=1e-3)
    asked = requests("generate_until", *((text, {"until": [], "max_gen_toks": 9}) for text in ("Who", begun, "")))
    found = ours.generate_until(asked, disable_tqdm=True)
    assert found == theirs.generate_until(asked, disable_tqdm=True) and found[0] == found[1] != found[2]


@pytest.mark.slow
def test_what_pads_is_no_part_of_an_answer(folder, tmp_path, monkeypatch):
    ours = HarnessModel(changed(folder, tmp_path, without=["pad_token"]))
    prompts = ["0:", "1:", "2:"]
    ids = [ours.tok_encode(prompt) for prompt in prompts]
    end = int(ours.model.generate(ids, max_new_tokens=40)[0, len(ids[0]) + 9])
    monkeypatch.setitem(ours.model.__dict__, "end_ids", [end])  # as if the checkpoint said so
    rows = ours.model.generate(ids, max_new_tokens=40)
    assert rows[0, -1] == ours.model.pad_id == 0 != rows[1, -1]  # one ends before another
    asked = requests("generate_until", *((prompt, {"until": [], "max_gen_toks": 40}) for prompt in prompts))
    alone = [ours.generate_until([request], disable_tqdm=True)[0] for request in asked]
    assert ours.generate_until(asked, disable_tqdm=True) == alone


def test_a_tokenizer_without_bos_and_eos_is_an_error(folder, tmp_path):
    with pytest.raises(ConfigError, match="has neither bos_token nor eos_token"):
        HarnessModel(changed(folder, tmp_path, without=["eos_token"]))


def test_a_tokenizer_without_a_chat_template_says_so(folder, tmp_path):
    with pytest.raises(ConversationError, match="has no chat template"):
        HarnessModel(changed(folder, tmp_path, without=["chat_template"])).apply_chat_template(CHAT)
