"""Values and placed pages, below the documents."""

import numpy as np
import pytest

from parsit_jax.documents import generator
from parsit_jax.documents.generator import FONTS, KINDS, Split, values
from parsit_jax.documents.generator.page import arrange, centre, left, right, row
from parsit_jax.documents.generator.values import Source, day_key, in_split


def source(split: Split, seed: int = 0) -> Source:
    return Source(np.random.default_rng(seed), split)


def test_a_tenth_of_all_keys_is_held_out_and_the_rest_is_trained_on():
    held_out = sum(in_split(str(number), Split.HELD_OUT) for number in range(20_000))
    assert 0.08 < held_out / 20_000 < 0.12
    assert all(in_split(str(n), Split.TRAIN) != in_split(str(n), Split.HELD_OUT) for n in range(1000))


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize(
    "draw",
    [
        lambda s: values.money_style(s)(values.cents(s)),
        lambda s: values.date_style(s)(values.day(s)),
        values.number,
        values.company,
    ],
    ids=["amount", "date", "number", "company"],
)
def test_values_come_from_at_least_ten_thousand_possibilities(draw, split):
    random = source(split)
    assert len({draw(random) for _ in range(20_000)}) >= 10_000


def test_both_readings_of_a_date_share_their_split():
    assert day_key((2021, 3, 4)) == day_key((2021, 4, 3)) == day_key((1921, 3, 4)) != day_key((2022, 3, 4))


@pytest.mark.parametrize("split", Split)
def test_parts_add_up_and_stay_in_the_split(split):
    random = source(split)
    for _ in range(50):
        parts = values.cents_parts(random, 123_456, 3)
        assert parts is not None and sum(parts) == 123_456
        assert all(in_split(str(part), split) for part in parts)
        beyond = values.cents_beyond(random, 5_000, 5, 2_500)
        assert beyond is not None and in_split(str(beyond), split) and in_split(str(5_000 + beyond), split)


def test_money_and_date_notations():
    assert values.Money("$", "", ",", ".")(120_450) == "$1,204.50"
    assert values.Money("", "€", ".", ",")(120_405) == "1.204,05€"
    assert values.Money("", "", "", ".")(7) == "0.07"
    assert [notation(2021, 3, 7) for notation in values.DATE_FORMATS] == [
        "07/03/2021",
        "03/07/2021",
        "07.03.2021",
        "2021-03-07",
        "2021/03/07",
        "07/03/21",
        "7 Mar 2021",
        "Mar 7, 2021",
        "07-Mar-21",
    ]


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("size", [(128, 128), (224, 320)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_text_lies_inside_the_page_and_touches_nothing(kind, size, monkeypatch):
    pages, render = [], generator.render

    def keep(source, page):
        pages.append(page)
        return render(source, page)

    monkeypatch.setattr(generator, "render", keep)
    for split in Split:
        for seed in range(60):
            generator.generate(kind, seed, split, size)
    assert len(pages) == 120
    for page in pages:
        boxes = [run.box for run in page.runs]
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= page.width and 0 <= y0 < y1 <= page.height
        for index, box in enumerate(boxes):
            assert not any(overlap(box, other) for other in boxes[:index]), page.transcription
            for stroke in page.strokes:
                x0, y0, x1, y1 = stroke.box
                assert 0 <= x0 <= x1 < page.width and 0 <= y0 <= y1 < page.height
                assert not overlap(box, (x0, y0, x1 + 1, y1 + 1)), (page.transcription, box, stroke)


@pytest.mark.parametrize("font", FONTS)
def test_tall_letters_in_tight_rows_do_not_touch(font):
    rows = [row(centre("|[j{g")) for _ in range(8)]
    for seed in range(5):
        page = arrange(source(Split.TRAIN, seed), rows, font, 124, 128, border=True)
        assert page is not None
        boxes = sorted((run.box for run in page.runs), key=lambda box: box[1])
        assert all(above[3] < below[1] for above, below in zip(boxes, boxes[1:], strict=False))


def test_what_does_not_fit_is_refused():
    assert arrange(source(Split.TRAIN), [row(left("W" * 40))], "DejaVuSans", 128, 128) is None
    assert arrange(source(Split.TRAIN), [row(left("W"))] * 20, "DejaVuSans", 128, 128) is None
    assert arrange(source(Split.TRAIN), [row(left("W" * 8), right("W" * 8))], "DejaVuSans", 128, 128) is None
