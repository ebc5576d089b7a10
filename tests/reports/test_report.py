"""The picture of a run: what is drawn where, and nothing that a log or an image may hold breaks it."""

import math

import numpy as np
import pytest
from PIL import Image, features

from miniclip.reports import charts as report
from miniclip.reports.charts import CAPTION, CHART, GAP, IMAGE, MARGIN, SHARPNESS, Page, curve, draw_report, ticks

GREEN = tuple(bytes.fromhex(report.GREEN[1:]))
CURVE = tuple(bytes.fromhex(report.LINES[0][1:]))


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Seven images of one color each, of various sizes."""
    paths = []
    for i, size in enumerate([(64, 64), (500, 20), (3, 90), (1, 1), (200, 300), (64, 64), (64, 64)]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", size, (250, 30 * i, 200)).save(paths[-1])
    return paths


def example(images: list[str], rank: int, caption: str = "two small red circles") -> dict:
    """A search whose right answer is `images[rank - 1]`, or the seventh image for a rank that is not shown."""
    retrieved = [(path, 0.9 - 0.1 * i) for i, path in enumerate(images[:5])]
    return {"caption": caption, "retrieved": retrieved, "correct": images[min(rank, 7) - 1], "rank": rank}


def drawn(path, log_history: list, examples: list, title: str = "a run") -> np.ndarray:
    draw_report(path, log_history, examples, title)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(picture: np.ndarray, color: tuple, x: float = 0, y: float = 0, w: float = 9999, h: float = 9999) -> int:
    """How many pixels of a box, given in points, have a color."""
    left, top, right, bottom = (int(p * SHARPNESS) for p in (x, y, x + w, y + h))
    return int((np.abs(picture[top:bottom, left:right] - color).max(-1) <= 3).sum())


def marked(picture: np.ndarray, y: float) -> list[bool]:
    """Which of the five places, and of the sixth beside them, carry a green frame."""
    lefts = [MARGIN + CAPTION + place * (IMAGE + GAP) for place in range(5)]
    lefts.append(lefts[-1] + IMAGE + 3 * GAP)
    # Its left edge: 3 points wide inside the frame, nearly as long as the image.
    return [count(picture, GREEN, left - 3, y, 6, IMAGE + 100) > IMAGE * SHARPNESS for left in lefts]


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 17])
def test_the_right_image_is_framed_and_no_other(tmp_path, images, rank):
    picture = drawn(tmp_path / "report.png", [], [example(images, rank)])
    assert marked(picture, MARGIN + CHART) == [place == min(rank, 6) for place in range(1, 7)]


def test_the_mark_does_not_rest_on_color(tmp_path, images):
    page = Page(200)
    report.draw_image(page, 20, 20, images[0], True, "1", "")
    page.save(tmp_path / "marked.png")
    picture = np.asarray(Image.open(tmp_path / "marked.png")).astype(int)
    badge = (20 + IMAGE - 11, 20 - 3, 14, 14)
    assert 40 < count(picture, (255, 255, 255), *badge) < count(picture, GREEN, *badge), "a white tick on a green disc"


def test_images_are_shown_whole_with_their_colors(tmp_path, images):
    picture = drawn(tmp_path / "report.png", [], [example(images, 17)])
    side = IMAGE - 8
    for i, area in enumerate([1, 20 / 500, 3 / 90, 1, 200 / 300]):
        assert count(picture, (250, 30 * i, 200)) == pytest.approx(area * (side * SHARPNESS) ** 2, rel=0.15)


def test_an_image_that_is_gone_leaves_a_hole(tmp_path, images):
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("no image")
    picture = drawn(tmp_path / "report.png", [], [example(images, 2)])
    assert marked(picture, MARGIN + CHART) == [False, True, False, False, False, False]


def test_curves_are_those_of_the_log():
    log = [
        {"step": 20, "loss": 2.0}, {"step": 10, "loss": 3.0, "epoch": 0.5}, {"step": 30, "loss": math.nan},
        {"step": 40, "loss": None}, {"loss": 9.0}, {"step": 20, "loss": 7.0}, {"step": 50, "loss": math.inf},
        {"step": 50, "eval_text_to_image_R@1": 0.5},
    ]  # fmt: skip
    assert curve(log, "loss") == [(10, 3.0), (20, 2.0)]
    assert curve(log, "eval_text_to_image_R@1") == [(50, 0.5)]
    assert curve([], "loss") == []


def test_curves_are_drawn_where_their_values_are(tmp_path):
    log = [{"step": step, "eval_text_to_image_R@1": 0.5} for step in (100, 200, 300)]
    picture = drawn(tmp_path / "report.png", log, [])
    top = (MARGIN - 8 + 46 + 62) * SHARPNESS  # of the plot, 100%
    bottom = (MARGIN - 8 + 46 + CHART - 44) * SHARPNESS  # 0%
    rows = np.flatnonzero((np.abs(picture[top:bottom, picture.shape[1] // 2 :] - CURVE).max(-1) <= 3).any(1))
    assert abs(rows.mean() - (bottom - top) / 2) < 3 and rows.max() - rows.min() < 16, "at 50%, a level line"
    assert count(picture[:, : picture.shape[1] // 2], CURVE) == 0, "no loss was logged, so none is drawn"


@pytest.mark.parametrize("top, wanted", [
    (1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1500, [0, 500, 1000, 1500]), (4.3, [0, 1, 2, 3, 4, 5]), (7, [0, 2, 4, 6, 8]),
    (0.013, [0, 0.005, 0.01, 0.015]),
])  # fmt: skip
def test_ticks_are_round(top, wanted):
    assert ticks(top) == pytest.approx(wanted)


@pytest.mark.parametrize("log", [
    [], [{}], [{"step": 0, "loss": 0.0}], [{"step": 1, "loss": 5.0}], [{"step": 1, "loss": math.nan}],
    [{"epoch": 1.0, "train_runtime": 3.0, "step": 5}], [{"step": 5, "eval_text_to_image_R@3": math.nan}],
    [{"step": 10 * i, "loss": 1e9 / (i + 1)} for i in range(500)], [{"step": 3, "loss": -1.0}],
    [{"step": 5, "eval_text_to_image_R@1": 0.0, "eval_text_to_image_R@5": 1.0, "eval_image_to_text_R@1": 0.3}],
])  # fmt: skip
def test_any_log_gives_a_picture(tmp_path, log):
    assert drawn(tmp_path / "new" / "report.png", log, []).shape[1] == report.WIDTH * SHARPNESS


CAPTIONS = [
    "", "x" * 500, "一只棕色的狗在草地上奔跑" * 9, "two\nlines\tand\r\nmore", "мальчик 🐕 e\u0301 \u202eכלב",
    "many words " * 99,
]  # fmt: skip


@pytest.mark.parametrize("freetype", [True, False])
def test_any_caption_can_be_drawn_with_and_without_freetype(tmp_path, images, monkeypatch, freetype):
    if not freetype:
        monkeypatch.setattr(features, "check", lambda feature: False)
        plain = report.ImageFont.load_default_imagefont()  # what load_default gives where FreeType is missing
        monkeypatch.setattr(report, "load_font", lambda pixels: {None: plain}[pixels])
    drawn(tmp_path / "report.png", [{"step": 1, "loss": 1.0}], [example(images, 9, c) for c in CAPTIONS], CAPTIONS[2])


def test_captions_are_wrapped_to_the_width_and_cut_with_dots():
    page = Page(10)
    for caption in CAPTIONS:
        lines = page.wrap(caption, 15, 200, 4)
        assert 1 <= len(lines) <= 4 and all(page.text_width(line, 15) <= 200 + 15 for line in lines)
    assert page.wrap("a small red circle", 15, 200, 4) == ["a small red circle"]
    assert page.wrap("two  small\nred circles", 15, 80, 4) == ["two small", "red circles"]
    assert page.wrap("many words " * 99, 15, 200, 3)[-1].endswith("...")
    assert "".join(page.wrap("x" * 60, 15, 100, 99)) == "x" * 60
