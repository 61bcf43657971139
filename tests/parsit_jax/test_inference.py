"""ParsitInference: what a user calls, on a model with random weights (its words mean nothing, its behaviour does)."""

import jax
import numpy as np
import pytest
from hf_folders import VISION, make_run, model_config
from PIL import Image

from parsit_jax import ParsitInference, inference
from parsit_jax.documents import images
from parsit_jax.documents.images import ImageError
from parsit_jax.inference import open_images, page_images
from vishwamai.chat import ConversationError
from vishwamai.generation.prompts import TooLongError
from vishwamai.templates import load_template
from vishwamai.tiny_tokenizer import ALPHABET, PIECES, build_tiny_tokenizer
from vishwamai.tokenizer import VishwamAITokenizer

FEW = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ParsitInference:
    folder = tmp_path_factory.mktemp("run")
    build_tiny_tokenizer(ALPHABET, PIECES, load_template("qwen3"), folder / "tokenizer")
    tokenizer = VishwamAITokenizer.from_pretrained(folder)
    text = dict(vocab_size=tokenizer.vocab_size, hidden_size=24, intermediate_size=40, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=160)
    vision = {**VISION, "vision_use_head": False}
    image = tokenizer.token_to_id("<|image_pad|>")
    make_run(folder, "parsit", model_config("parsit", vision=vision, text=text, image_token_id=image), scale=0.5)
    return ParsitInference(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Three different page images as files."""
    folder, random = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return paths


def test_every_method_returns_text(model, pages):
    question = "What is the total?"
    answer = model.answer_question(pages[0], question, **FEW)
    assert isinstance(answer, str) and answer
    assert model.analyze_document(pages[0], question, **FEW) == answer
    assert model.chat(question, pages[0], **FEW) == answer
    item = {"type": "image", "image": str(pages[0])}
    assert model.chat([{"role": "user", "content": [item, {"type": "text", "text": question}]}], **FEW) == answer
    for text in (model.extract_text(pages[0], **FEW), model.analyze_document(pages[0], **FEW), model.chat("Hi", **FEW)):
        assert isinstance(text, str)


def test_the_answer_depends_on_the_page(model, pages):
    answers = {model.answer_question(page, "What is the total?", **FEW) for page in pages}
    assert len(answers) > 1


def test_a_batch_answers_as_one_by_one(model, pages):
    questions = ["What is the total?", "What?", "What is the name of the shop?"]
    together = model.answer_batch(pages, questions, **FEW)
    assert together == [model.answer_question(p, q, **FEW) for p, q in zip(pages, questions, strict=True)]
    assert model.answer_batch([], []) == []
    with pytest.raises(ValueError, match="shorter|longer"):
        model.answer_batch(pages, ["one"])


def test_sampling_is_reproducible(model, pages):
    draw = lambda seed: model.answer_question(pages[0], "What?", temperature=1.5, top_p=0.95, seed=seed, **FEW)  # noqa: E731
    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_several_images_in_a_chat(model, pages):
    items = [{"type": "image", "image": page} for page in pages[:2]]
    content = [*items, {"type": "text", "text": "Which?"}]
    swapped = [*reversed(items), {"type": "text", "text": "Which?"}]
    one, other = (model.chat([{"role": "user", "content": c}], **FEW) for c in (content, swapped))
    assert one != other


def test_a_pdf_is_read_page_by_page(model, pages, tmp_path):
    path = tmp_path / "two.pdf"
    first, second = (Image.open(page) for page in pages[:2])
    first.save(path, save_all=True, append_images=[second])
    text = model.analyze_document(path, **FEW)
    assert text.startswith("Page 1\n") and "\n\nPage 2\n" in text
    assert "Page" not in model.analyze_document(path, pages=[2], **FEW).split("\n")[0]
    with pytest.raises(ImageError, match="pages 1 to 2, found page 3"):
        model.analyze_document(path, pages=[3], **FEW)


def test_pages_are_drawn_when_they_are_asked_for(pages, tmp_path, monkeypatch):
    path, drawn = tmp_path / "three.pdf", []
    first, *others = (Image.open(page) for page in pages)
    first.save(path, save_all=True, append_images=others)
    render = images._rendered
    monkeypatch.setattr(images, "_rendered", lambda *given: drawn.append(given[1]) or render(*given))
    assert next(page_images(path, None))[0] == 1
    assert drawn == [1]
    assert [number for number, _ in page_images(path, [3, 1])] == [3, 1]


def test_an_answer_stops_at_its_end_whatever_stands_behind(model, pages, monkeypatch):
    seen, tokenizer = [], model.model.tokenizer

    class Recorded(inference.Generation):
        def advance(self, count):
            super().advance(count)
            seen.append(self.tokens[0].tolist())

    monkeypatch.setattr(inference, "Generation", Recorded)
    monkeypatch.setattr(tokenizer, "eos_token_ids", ())
    whole = model.answer_question(pages[0], "What?", max_new_tokens=20)
    tokens = seen[0]
    assert len(tokens) == 20 and whole == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    place = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(tokenizer, "eos_token_ids", (tokens[place],))
    monkeypatch.setattr(tokenizer, "pad_token_id", tokenizer.encode("x")[0])  # what pads is a word
    answers = model.answer_batch([pages[0]] * 2, ["What?", "Who?"], max_new_tokens=20)
    assert answers[0] == tokenizer.decode(tokens[:place], skip_special_tokens=True).strip()
    assert answers[0] != whole and len(seen[1]) > place


@pytest.mark.parametrize("cache_dtype, most", [("int8", 0.05), ("float8_e4m3fn", 0.15)])
def test_a_quantised_cache_answers_nearly_the_same(model, pages, monkeypatch, cache_dtype, most):
    """Of words that are about as likely as each other: log-probabilities say more than which was taken."""
    found = {}

    class Recorded(inference.Generation):
        def __init__(self, *given, **options):
            super().__init__(*given, keep_log_probabilities=True, **options)
            found[options["cache_dtype"]] = self

    monkeypatch.setattr(inference, "Generation", Recorded)
    for dtype in (None, cache_dtype):
        monkeypatch.setattr(model, "cache_dtype", dtype)
        model.answer_question(pages[0], "What is the total?", **FEW)
    whole, quantised = found[None], found[cache_dtype]
    of = lambda dtype: {x.dtype.name for x in jax.tree.leaves(found[dtype].state.cache.layers)}  # noqa: E731
    assert of(None) == {"float32"} and of(cache_dtype) == {"float32", cache_dtype}  # scales and vectors
    np.testing.assert_array_equal(quantised.tokens, whole.tokens)
    assert 0 < np.abs(quantised.log_probabilities - whole.log_probabilities).max() < most


def test_a_cache_of_another_dtype_is_refused_before_a_model_is_read():
    with pytest.raises(ValueError, match="cache_dtype='int4': expected int8, float8_e4m3fn, or None"):
        ParsitInference("nowhere", cache_dtype="int4")


def test_bad_input_is_told(model, pages):
    with pytest.raises(ImageError, match="no image file"):
        model.answer_question("missing.png", "What?")
    with pytest.raises(ValueError, match="page 1 only"):
        model.analyze_document(pages[0], pages=[2])
    with pytest.raises(ValueError, match="image item without"):
        open_images([{"role": "user", "content": [{"type": "image"}]}])
    for messages, message in [
        ([], "at least one message"),
        (["What?"], "message 0: expected a role"),
        ([{"role": "user"}], "content is a text or a list of items"),
        ([{"role": "user", "content": ["What?"]}], "an item is a text .* or an image"),
    ]:
        with pytest.raises(ConversationError, match=message):
            model.chat(messages)
    with pytest.raises(
        TooLongError, match=r"^conversation 1 needs \d+ tokens \(16 an image\), the context holds 160: ask"
    ):
        model.answer_batch([pages[0]] * 3, ["What?", "very long " * 40, "Who?"])
    with pytest.raises(ValueError, match="goes with a question as text"):
        model.chat([{"role": "user", "content": "What?"}], pages[0])
