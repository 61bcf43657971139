"""Drawn pages: the same at every start, questions and answers of the page, nothing cut."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tokenizers

from parsit_jax import prompts
from parsit_jax.data.batches import batch_source
from parsit_jax.data.config import DatasetConfig
from parsit_jax.data.generated import conversations
from parsit_jax.documents.generator import Split, generate
from parsit_jax.documents.patches import patchify, preprocess
from vishwamai.config import ConfigError
from vishwamai.data.sources import DataError
from vishwamai.tokenizer import VishwamAITokenizer

RECEIPTS = {"generated": "receipts"}
LINES = {"generated": "lines", "task": "transcribe"}


def learned(batch, tokenizer, row):
    return tokenizer.decode(batch.tokens[row][batch.loss_weights[row] > 0])


def test_batches_are_the_same_after_a_restart_and_differ_by_step_seed_and_dataset(experiment, tokenizer):
    def arrays(step, *datasets, **others):
        return batch_source(experiment(*(datasets or [RECEIPTS]), **others), tokenizer).batch(step).as_dict()

    first = arrays(3)
    for name, array in arrays(3).items():
        np.testing.assert_array_equal(array, first[name])
    for other in (arrays(4), arrays(3, seed=1)):
        assert (other["patches"] != first["patches"]).any(axis=(1, 2)).all()
    both = arrays(0, RECEIPTS | {"weight": 1}, RECEIPTS | {"weight": 1})
    assert len({row.tobytes() for row in both["patches"]}) == 4


def test_questions_are_asked_in_turns_about_the_page_shown(experiment, tokenizer):
    made = experiment(RECEIPTS)
    source = batch_source(made, tokenizer)
    batch = source.batch(0)
    for row in range(batch.rows):
        (example,) = source.row(row)
        assert (batch.feature_index[row] >= 0).sum() == source.capacity.image.tokens == 64
        answers = learned(batch, tokenizer, row).split("<|im_end|>")[:-1]
        said = tokenizer.decode(example.tokens)
        assert len(answers) >= 4 and said.count("<|im_start|>user") == len(answers)
        assert all(answer and "user" not in answer for answer in answers)


def test_the_order_of_questions_is_shuffled_and_answers_stay_with_them():
    places = set()
    for seed in range(6):
        document = generate("receipts", seed, Split.TRAIN)
        truth = {question.text: question.answer for question in document.questions}
        messages = next(conversations(document, DatasetConfig(**RECEIPTS)))
        asked = [message["content"][-1]["text"] for message in messages[::2]]
        answered = [message["content"] for message in messages[1::2]]
        assert dict(zip(asked, answered, strict=True)) == truth
        assert [item["type"] for item in messages[0]["content"]] == ["image", "text"]
        places.add(asked.index(document.questions[0].text))
    assert len(places) > 2


def test_max_questions():
    document = generate("receipts", 5, Split.TRAIN)
    config = DatasetConfig(**RECEIPTS, max_questions=2)
    assert [len(messages) for messages in conversations(document, config)] == [4, 2]


def test_lines_are_continued_from_a_word_on_in_random_order():
    config = DatasetConfig(generated="notes", task="continue")
    document = generate("notes", 3, Split.TRAIN)
    lines = [line for line in document.transcription.splitlines() if " " in line]
    messages = next(conversations(document, config))
    said = []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        start = question["content"][-1]["text"].removeprefix("What follows ").removesuffix("?")
        said.append(f"{start} {answer['content']}")
    assert sorted(said) == sorted(lines) and said != lines
    assert "content" in messages[0] and messages[0]["content"][0] == {"type": "image"}


def test_a_page_of_single_words_is_read_instead():
    document = replace(generate("notes", 3, Split.TRAIN), transcription="one\ntwo")
    ((question, answer),) = conversations(document, DatasetConfig(generated="notes", task="continue"))
    assert question["content"][-1]["text"] == prompts.READ_PAGE and answer["content"] == "one\ntwo"


def test_transcription_asks_one_thing_and_answers_all_that_is_printed():
    document = generate("lines", 5, Split.TRAIN)
    ((question, answer),) = conversations(document, DatasetConfig(**LINES))
    assert question["content"] == [{"type": "image"}, {"type": "text", "text": prompts.READ_PAGE}]
    assert answer["content"] == document.transcription


def test_patches_are_the_drawn_page(experiment, tokenizer):
    source = batch_source(experiment(LINES), tokenizer)
    seed = int(np.random.SeedSequence([0, 0, 2, 0]).generate_state(1, np.uint64)[0])
    document = generate("lines", seed, Split.TRAIN, (128, 128))
    np.testing.assert_array_equal(source.batch(0).patches[2], patchify(preprocess(document.image, 128, 128), 16))
    assert learned(source.batch(0), tokenizer, 2) == document.transcription + "<|im_end|>"


def test_as_many_whole_questions_as_fit_are_asked(experiment, tokenizer):
    full = batch_source(experiment(RECEIPTS), tokenizer)
    short = batch_source(experiment(RECEIPTS, max_length=200), tokenizer)
    for row in range(8):
        (all_of_it,), (part,) = full.row(row), short.row(row)
        assert len(part.tokens) <= 200
        whole, cut = (tokenizer.decode(example.tokens[example.loss_weights > 0]) for example in (all_of_it, part))
        assert whole.startswith(cut) and cut.endswith("<|im_end|>")


def test_as_many_pages_as_fit_share_a_row(experiment, tokenizer):
    source = batch_source(experiment(RECEIPTS, max_length=1200, max_patches=200), tokenizer)
    batch = source.batch(0)
    assert batch.segment_ids.max(axis=1).tolist() == [3] * 4
    assert batch.patch_segment_ids.max(axis=1).tolist() == [3] * 4
    assert len({patches.tobytes() for patches in batch.patches[:, :192].reshape(12, 64, -1)}) == 12


def test_blank_patches_can_be_left_out(experiment, tokenizer):
    source = batch_source(experiment(LINES | {"skip_blank_patches": True}, max_patches=96), tokenizer)
    whole = batch_source(experiment(LINES), tokenizer)
    batch = source.batch(0)
    for row in range(batch.rows):
        examples = source.row(row)
        assert len(examples) > 1  # several pages where one was
        (full,) = whole.row(row)
        first, places = examples[0].images[0], examples[0].positions[0]
        pixels = full.images[0].reshape(8, 8, -1)
        np.testing.assert_array_equal(first, pixels[places[:, 0], places[:, 1]])  # the same page, where there is ink
        spread = pixels.max(axis=-1).astype(int) - pixels.min(axis=-1)
        assert len(first) == (spread > 60).sum()
        shown = batch.patch_segment_ids[row]
        for number, example in enumerate(examples, start=1):
            assert (example.feature_index >= 0).sum() == len(example.images[0])
            np.testing.assert_array_equal(batch.patches[row][shown == number], example.images[0])
            np.testing.assert_array_equal(batch.patch_positions[row][shown == number], example.positions[0])
        index = batch.feature_index[row]
        assert index[index >= 0].tolist() == list(range((shown > 0).sum()))


def test_weights_mix_datasets(experiment, tokenizer):
    source = batch_source(experiment(RECEIPTS | {"weight": 1}, LINES | {"weight": 3}, batch_size=16), tokenizer)
    batch = source.batch(0)
    kinds = Counter(prompts.READ_PAGE in tokenizer.decode(row) for row in batch.tokens)
    assert kinds == {True: 12, False: 4}


def test_a_page_that_does_not_fit(experiment, tokenizer, caplog):
    with pytest.raises(DataError, match=r"receipts needs \d+ tokens and 64 patches, a row holds 80 and 64: raise"):
        batch_source(experiment(RECEIPTS, max_length=80), tokenizer).batch(0)
    skipping = batch_source(experiment(LINES, max_length=105, too_long="skip"), tokenizer)
    lengths = [len(skipping.row(row)[0].tokens) for row in range(12)]
    assert max(lengths) <= 105
    assert caplog.text.count("lines that need more than a row's 105 tokens and 64 patches are drawn anew") == 1
    with pytest.raises(DataError, match="a page of lines needs"):
        for row in range(12):
            batch_source(experiment(LINES, max_length=105), tokenizer).row(row)


def test_kinds_without_questions_say_so(experiment, tokenizer):
    with pytest.raises(DataError, match="lines have no questions: set task: transcribe"):
        batch_source(experiment({"generated": "lines"}), tokenizer).batch(0)


@pytest.mark.parametrize(
    ("dataset", "others", "message"),
    [
        (RECEIPTS, {"max_patches": 63}, "holds no image, which has 64 patches"),
        (RECEIPTS, {"max_patches": 96, "pooling": "average_2x2"}, "no multiple of an image's 64 patches"),
        (RECEIPTS | {"skip_blank_patches": True}, {"pooling": "average_2x2"}, "exclude each other"),
        (RECEIPTS, {"image_token_id": 3}, r"set it to \d+"),
        (RECEIPTS, {"vocab_size": 100, "image_token_id": 3}, "the model's vocab_size is 100"),
    ],
)
def test_sizes_that_do_not_fit_each_other(experiment, tokenizer, dataset, others, message):
    with pytest.raises(ConfigError, match=message):
        batch_source(experiment(dataset, **others), tokenizer)


def test_a_tokenizer_without_images(experiment, tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"has no <\|image_pad\|>: name the model's own tokenizer"):
        batch_source(experiment(RECEIPTS), VishwamAITokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([{"generated": "novels"}], "no kind of document: choose one of"),
        ([{}], "either json_path or generated"),
        ([RECEIPTS | {"json_path": "a.json"}], "either json_path or generated"),
        ([RECEIPTS | {"image_folder": "x"}], "image_folder has no meaning for drawn pages"),
        ([{"json_path": "a.json", "max_questions": 2}], "max_questions has no meaning for files"),
        ([RECEIPTS | {"weight": float("inf")}], "finite number"),
        ([RECEIPTS, LINES], "every dataset needs a weight"),
        ([RECEIPTS | {"weight": 1}, LINES], "either every dataset has a weight or none"),
    ],
)
def test_configs_that_make_no_sense(experiment, datasets, message):
    with pytest.raises(ValueError, match=message):
        experiment(*datasets)


def test_a_resolved_config_is_read_back(experiment):
    data = experiment(RECEIPTS | {"weight": 1}, {"json_path": "a.json", "weight": 2}).data
    assert type(data).model_validate(data.model_dump(mode="json")) == data
