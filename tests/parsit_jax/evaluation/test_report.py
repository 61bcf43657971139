import base64
import io
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from parsit_jax.evaluation.benchmarks import Example
from parsit_jax.evaluation.curves import MAX_POINTS, draw_curves, read_metrics
from parsit_jax.evaluation.report import write_report
from parsit_jax.evaluation.run import evaluate

EVIL = '<script>alert("1 & 2")</script>'


class Page(HTMLParser):
    """The report's tags, text and every attribute that could load something."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.sources, self.text, self.verdicts = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.sources += [attributes[key] for key in ("src", "href", "xlink:href") if key in attributes]
        if "title" in attributes:
            self.verdicts.append(attributes["title"])

    def handle_data(self, data):
        self.text.append(data.strip())


def examples_of(pages: int) -> list[Example]:
    return [
        Example(f"{p}-{q}", f"page{p}", Image.new("L", (8, 8), p), q, ("123456",), {"field": q})
        for p in range(pages)
        for q in ("total?", f"{EVIL}?")
    ]


@pytest.fixture
def run(tmp_path, Oracle):
    """An evaluated run of 20 pages: page 0 read wrongly, page 1 nearly, the rest well."""
    folder = tmp_path / f"run of {EVIL.replace('/', '')}"
    examples = examples_of(20)
    said = {"page0": EVIL, "page1": "123x56"}
    oracle = Oracle(examples, blank="", alter=lambda e: said.get(e.page, "123456"))
    evaluate(oracle, {"tiny": examples}, output=folder, provenance={"step": 1200})
    (folder / "config.yaml").write_text(f"model:\n  name: {EVIL}\n")
    rows = [{"step": s, "loss": 5 / s, "learning_rate": 1e-3, "tokens_per_second": 9.0} for s in range(1, 50)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_report_shows_scores_pages_curves_and_config(run):
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(filter(None, page.text))
    results = json.loads((run / "results.json").read_text())["benchmarks"]["tiny"]
    for expected in (
        "step 1,200",
        f"{results['anls']:.3f}",
        "tiny: worst pages",
        "tiny: best pages",
        "tokens/s",
        f"name: {EVIL}",
        "40",
        "questions on 20 pages",
        "(nothing)",
    ):
        assert expected in text, expected
    assert page.text.index("page0") < page.text.index("page1") < page.text.index("tiny: best pages")
    verdicts = page.verdicts
    assert verdicts[:4] == ["wrong", "wrong", "near", "near"] and set(verdicts[4:]) == {"right"}
    assert page.text[page.text.index("123") :][:3] == ["123", "x", "56"]  # what differs is set apart


def test_report_is_one_file_and_everything_is_escaped(run):
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags
    images = [source for source in page.sources if not source.startswith("#")]
    assert len(images) == 8 and all(source.startswith("data:image/png;base64,") for source in images)
    assert "@import" not in html and "url(http" not in html


def test_report_without_training_curves_and_with_a_lost_image(run, tmp_path):
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").unlink()
    (run / "pages" / "tiny" / "page0.png").unlink()
    (run / "pages" / "tiny" / "page1.png").write_bytes(b"no image")
    html = write_report(run).read_text(encoding="utf-8")
    assert "Training" not in html and "Config" not in html
    assert html.count("no longer there") == 2


def test_report_beside_another_run(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (run / "results.json").rename(run / "moved.json")
    with pytest.raises(FileNotFoundError, match="no results.json"):
        write_report(run)
    elsewhere.mkdir()
    (run / "moved.json").rename(elsewhere / "results.json")
    with pytest.raises(FileNotFoundError, match="predictions are missing"):
        write_report(elsewhere, run)
    (run / "predictions").rename(elsewhere / "predictions")
    assert "tokens/s" in write_report(elsewhere, run).read_text(encoding="utf-8")


def test_a_page_is_shown_as_the_model_saw_it(tmp_path, Oracle):
    page = Image.new("RGBA", (6, 4), (0, 0, 0, 0))  # transparent: white to the model
    exif = Image.Exif()
    exif[0x0112] = 6
    page.save(tmp_path / "scan.png", exif=exif)
    examples = [Example("a", "a", tmp_path / "scan.png", "?", ("1",))]
    evaluate(Oracle(examples), {"tiny": examples}, output=tmp_path / "out")
    (source,) = Page(write_report(tmp_path / "out").read_text(encoding="utf-8")).sources
    with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as shown:
        assert shown.size == (4, 6) and shown.convert("L").getextrema() == (255, 255)


def test_few_pages_are_all_shown_and_large_ones_embedded_smaller(tmp_path, Oracle):
    Image.new("RGB", (3000, 1000)).save(tmp_path / "large.jpg")
    examples = [Example("a", "a", tmp_path / "large.jpg", "?", ("1",))]
    evaluate(Oracle(examples), {"tiny": examples}, output=tmp_path / "out")
    html = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "tiny: all pages" in html and "data:image/jpeg;base64," in html
    assert len(html) < 60_000


def test_metrics_of_a_killed_and_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}]
    path.write_text('{"step": 1, "loss": 3}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object with a step, found 'not json'"):
        read_metrics(path)


def test_curves_draw_what_is_there():
    rows = [{"step": s, "loss": 3.0, "grad_norm": float("nan")} for s in range(10 * MAX_POINTS)]
    svg = draw_curves(rows)
    assert ">loss<" in svg and "gradient norm" not in svg and "currentColor" in svg
    assert len(svg) < 200_000  # thinned out
    assert draw_curves([{"step": 1, "loss": 3.0}]) == "" == draw_curves([])
