import json
from pathlib import Path

import pytest
from PIL import Image

from parsit_jax.documents.images import ImageError
from parsit_jax.evaluation.benchmarks import BenchmarkError, Example, load_benchmarks
from parsit_jax.evaluation.run import evaluate
from vishwamai.generation.prompts import TooLongError


def page(shade: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, shade)


@pytest.fixture
def examples():
    fields = ["total", "total", "date"]
    return [
        Example(f"{i}", f"p{i}", page(i), f"What is the {f}?", ("12.00",), {"field": f}) for i, f in enumerate(fields)
    ]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_predictions_and_results(examples, tmp_path, Oracle):
    # Right, near (one of five characters wrong), and beyond ANLS's threshold.
    said = {"0": "12.00", "1": "12.90", "2": "99999"}
    oracle = Oracle(examples, blank="12.0", alter=lambda example: f" {said[example.id]}\n")
    results = evaluate(oracle, {"tiny": examples}, output=tmp_path, provenance={"step": 30})

    scores = results["benchmarks"]["tiny"]
    assert scores["examples"] == 3
    assert scores["anls"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["relaxed_accuracy"] == pytest.approx(1 / 3)  # 12.90 is 7.5 % off
    assert scores["character_error_rate"] == pytest.approx((0 + 0.2 + 1) / 3)
    assert scores["image_blanked"]["anls"] == pytest.approx(0.8)
    assert scores["image_blanked"]["exact_match"] == 0.0
    assert scores["by"]["field"]["total"]["anls"] == pytest.approx(0.9)
    assert scores["by"]["field"]["total"]["examples"] == 2
    assert scores["by"]["field"]["date"]["anls"] == 0.0
    assert results["step"] == 30 and results["limit"] is None
    assert json.loads((tmp_path / "results.json").read_text()) == results

    rows = rows_of(tmp_path / "predictions" / "tiny.jsonl")
    assert [row["prediction"] for row in rows] == ["12.00", "12.90", "99999"]  # stripped
    assert rows[1]["image_blanked"]["prediction"] == "12.0"
    assert rows[1]["answers"] == ["12.00"] and rows[1]["groups"] == {"field": "total"}
    with Image.open(tmp_path / rows[1]["image"]) as saved:
        assert saved.tobytes() == examples[1].image.tobytes()
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"results.json", "tiny.jsonl", "p0.png", "p1.png", "p2.png"}  # nothing unfinished


def test_a_perfect_reader_of_generated_pages_scores_one_and_a_blind_one_near_zero(tmp_path, Oracle):
    examples = list(load_benchmarks(["generated"])["generated"])
    results = evaluate(Oracle(examples, blank="12.50"), {"generated": iter(examples)}, output=tmp_path)
    scores = results["benchmarks"]["generated"]
    assert scores["examples"] == len(examples) >= 300
    assert scores["anls"] == scores["exact_match"] == 1.0
    assert scores["character_error_rate"] == 0.0
    assert scores["image_blanked"]["anls"] < 0.3
    assert set(scores["by"]) == {"field", "font", "layout"}


def test_blanked_pages_are_white_of_the_same_size_and_asked_once_per_question(tmp_path, Oracle):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: upright it is 9 wide
    Image.new("RGB", (5, 9)).save(tmp_path / "stored.png", exif=exif)
    examples = [
        Example("a", "a", page(1), "total?", ("1",)),
        Example("b", "b", page(2), "total?", ("2",)),
        Example("c", "c", page(3, (4, 6)), "total?", ("3",)),
        Example("d", "d", tmp_path / "stored.png", "date?", ("4",)),
    ]
    oracle = Oracle(examples)
    evaluate(oracle, {"tiny": examples}, output=tmp_path / "out")
    (blank_images, blank_questions), (images, questions) = oracle.batches
    assert sorted(zip([i.size for i in blank_images], blank_questions, strict=True)) == [
        ((4, 6), "total?"),
        ((8, 8), "total?"),
        ((9, 5), "date?"),
    ]
    assert all(image.convert("L").getextrema() == (255, 255) for image in blank_images)
    assert images == [example.image for example in examples]
    assert questions == ["total?", "total?", "total?", "date?"]
    stored = rows_of(tmp_path / "out" / "predictions" / "tiny.jsonl")[3]["image"]
    assert Path(stored) == (tmp_path / "stored.png").resolve()


def test_limit_batches_and_progress(examples, tmp_path, Oracle):
    oracle, progress = Oracle(examples), []
    results = evaluate(
        oracle,
        {"tiny": iter(examples * 3)},
        output=tmp_path,
        limit=7,
        batch_size=3,
        on_progress=lambda *report: progress.append(report),
    )
    assert results["benchmarks"]["tiny"]["examples"] == 7 and results["limit"] == 7
    assert [len(questions) for _, questions in oracle.batches] == [2, 3, 3, 1]  # two kinds of blanks first
    assert progress == [("tiny", done, 9) for done in (2, 5, 8, 9)]


def test_questions_beyond_the_context_count_as_wrong_and_the_others_are_answered(examples, tmp_path, Oracle):
    class Short(Oracle):
        """Reads 17 letters."""

        def answer_batch(self, images, questions):
            if long := {i: f"needs {len(text)} letters" for i, text in enumerate(questions) if len(text) > 17}:
                raise TooLongError(long, "ask less")
            return super().answer_batch(images, questions)

    oracle = Short(examples, blank="12.00")
    scores = evaluate(oracle, {"tiny": examples}, output=tmp_path)["benchmarks"]["tiny"]
    assert scores["unanswered"] == {"0": "needs 18 letters", "1": "needs 18 letters"}
    assert scores["examples"] == 3 and scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["image_blanked"]["exact_match"] == pytest.approx(1 / 3)
    rows = rows_of(tmp_path / "predictions" / "tiny.jsonl")
    assert [(row["id"], row["prediction"]) for row in rows] == [("0", ""), ("1", ""), ("2", "12.00")]
    assert [row["unanswered"] for row in rows] == ["needs 18 letters"] * 2 + [None]


def test_an_interrupted_evaluation_leaves_the_last_one_whole(examples, tmp_path, Oracle):
    evaluate(Oracle(examples), {"tiny": examples}, output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}

    class Interrupted(Oracle):
        def answer_batch(self, images, questions):
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().answer_batch(images, questions)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(examples, blank="x"), {"tiny": examples}, output=tmp_path, batch_size=2)
    assert {path: path.read_bytes() for path in before} == before


def test_bad_files_are_found_before_the_first_question(examples, tmp_path, Oracle):
    (tmp_path / "scan.png").write_bytes(b"%PDF-1.7")
    oracle, scanned = Oracle(examples), Example("a", "a", tmp_path / "scan.png", "total?", ("1",))
    with pytest.raises(ImageError, match=r"scan\.png is a PDF"):
        evaluate(oracle, {"tiny": examples, "scans": [scanned]}, output=tmp_path / "out")
    assert not oracle.batches and not (tmp_path / "out").exists()


def test_bad_input(examples, tmp_path, Oracle):
    with pytest.raises(BenchmarkError, match="'tiny' has no questions"):
        evaluate(Oracle([]), {"tiny": []}, output=tmp_path)

    class Short(Oracle):
        def answer_batch(self, images, questions):
            return super().answer_batch(images, questions)[1:]

    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        evaluate(Short(examples), {"tiny": examples}, output=tmp_path)
