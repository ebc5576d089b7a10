"""The charts: the right data is drawn, and no log and no image breaks them."""

import math

import numpy as np
import pytest
from PIL import Image

from miniclip.reports.charts import curve, draw_report, draw_sweep
from miniclip.reports.style import GREEN, WIDTH, fit, new_figure, styled
from miniclip.utils.image_files import ImageFile


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


def drawn(path, log_history: list, examples: list, title: str = "a run"):
    """The figure, and the pixels that were written."""
    figure = draw_report(path, log_history, examples, title)
    return figure, np.asarray(Image.open(path).convert("RGB")).astype(int)


def pixels(picture: np.ndarray, axes) -> np.ndarray:
    """The pixels of some axes, with the frame around them."""
    box = axes.get_position().padded(0.003)
    height, width = picture.shape[:2]
    rows = slice(round((1 - box.y1) * height), round((1 - box.y0) * height))
    return picture[rows, round(box.x0 * width) : round(box.x1 * width)]


def count(picture: np.ndarray, color) -> int:
    return int((np.abs(picture - color).max(-1) <= 3).sum())


def marked(figure, picture: np.ndarray) -> list[bool]:
    """Which images have a green frame in the pixels, and a tick mark for those who do not tell green from red."""
    green, found = tuple(bytes.fromhex(GREEN[1:])), []
    for axes in figure.axes[2:]:
        framed = count(pixels(picture, axes), green) > 3 * axes.bbox.height
        assert framed == axes.get_xlabel().startswith("✓")
        found.append(framed)
    return found


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 17])
def test_the_right_image_is_framed_and_no_other(tmp_path, images, rank):
    figure, picture = drawn(tmp_path / "report.png", [], [example(images, rank)])
    assert marked(figure, picture) == [place == min(rank, 6) for place in range(1, 6 + (rank > 5))]
    texts = [text.get_text() for text in figure.texts]
    assert "two small red circles" in texts
    assert ("correct image first" if rank == 1 else f"correct image at rank {rank}") in texts
    labels = [axes.get_xlabel().removeprefix("✓ ") for axes in figure.axes[2:]]
    assert labels[:5] == [f"{place}   {1 - place / 10:.3f}" for place in range(1, 6)]
    assert labels[5:] == [f"{rank}"] * (rank > 5)


def test_images_are_shown_whole_with_their_colors(tmp_path, images):
    figure, picture = drawn(tmp_path / "report.png", [], [example(images, 17)])
    side = figure.axes[2].bbox.height * 200 / figure.dpi / 1.06
    for i, area in enumerate([1, 20 / 500, 3 / 90, 1, 200 / 300]):
        found = count(pixels(picture, figure.axes[2 + i]), (250, 30 * i, 200))
        assert found == pytest.approx(area * side**2, rel=0.15)


def test_an_image_that_is_gone_leaves_a_hole(tmp_path, images):
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("no image")
    figure, picture = drawn(tmp_path / "report.png", [], [example(images, 2)])
    assert marked(figure, picture) == [False, True, False, False, False]
    said = [[text.get_text() for text in axes.texts] for axes in figure.axes[2:]]
    assert said == [["no image"], ["no image"], [], [], []]


class Handle(ImageFile):
    """An image that is not a file of its own, as in a table or a shard."""

    def __init__(self, path: str):
        self.path = path

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()

    def __str__(self) -> str:
        return f"table.parquet: {self.path}"


def test_images_in_tables_are_shown(tmp_path, images):
    figure, picture = drawn(tmp_path / "report.png", [], [example([Handle(path) for path in images], 9)])
    assert marked(figure, picture) == [False] * 5 + [True]
    assert not any(axes.texts for axes in figure.axes[2:]) and all(axes.images for axes in figure.axes[2:])


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
    figure, picture = drawn(tmp_path / "report.png", log, [])
    loss, recall = figure.axes
    (line,) = recall.lines
    assert line.get_xydata().tolist() == [[100, 0.5], [200, 0.5], [300, 0.5]] and line.get_label() == "R@1  50.0%"
    rows = np.flatnonzero((np.abs(pixels(picture, recall) - [29, 78, 216]).max(-1) <= 3).any(1))
    low, high = recall.get_ylim()
    middle = len(pixels(picture, recall)) * (high - 0.5) / (high - low)
    assert abs(rows.mean() - middle) < 6 and rows.max() - rows.min() < 24, "at 50%, a level line"
    assert not loss.lines and [text.get_text() for text in loss.texts] == ["nothing was logged"]
    ticks = [label.get_text() for label in recall.get_yticklabels()]
    assert ticks[:6] == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_zero_shot_accuracy_is_drawn_beside_recall(tmp_path):
    log = [{"step": step, "eval_text_to_image_R@1": 0.5, "eval_zero_shot_top1": step / 400} for step in (100, 200)]
    recall = drawn(tmp_path / "report.png", log, [])[0].axes[1]
    assert [line.get_label() for line in recall.lines] == ["R@1  50.0%", "zero-shot  50.0%"]
    assert recall.lines[1].get_ydata().tolist() == [0.25, 0.5] and "zero-shot" in recall.get_title("left")


def test_noisy_losses_have_a_running_mean(tmp_path):
    log = [{"step": step, "loss": 3.0 + step % 2} for step in range(1, 201)]
    figure, _ = drawn(tmp_path / "report.png", log + [{"step": 201, "loss": math.nan}], [])
    thin, mean = figure.axes[0].lines
    assert thin.get_ydata().tolist() == [entry["loss"] for entry in log]
    for step in (0, 5, 100, 199):
        window = thin.get_ydata()[max(0, step - 5) : step + 6]
        assert mean.get_ydata()[step] == pytest.approx(window.mean())
    assert figure.axes[0].get_title("right") == "not finite, skipped: 1"


@pytest.mark.parametrize("log", [
    [], [{}], [{"step": 0, "loss": 0.0}], [{"step": 1, "loss": 5.0}], [{"step": 1, "loss": math.nan}],
    [{"epoch": 1.0, "train_runtime": 3.0, "step": 5}], [{"step": 5, "eval_text_to_image_R@3": math.nan}],
    [{"step": 10 * i, "loss": 1e9 / (i + 1)} for i in range(500)], [{"step": 3, "loss": -1.0}],
    [{"step": 5, "eval_text_to_image_R@1": 0.0, "eval_text_to_image_R@5": 1.0, "eval_image_to_text_R@1": 0.3}],
])  # fmt: skip
def test_any_log_gives_a_picture(tmp_path, log):
    figure, picture = drawn(tmp_path / "new" / "report.png", log, [])
    assert picture.shape[1] == round(200 * WIDTH) == 2360
    for axes in figure.axes:
        points = [point for line in axes.lines for point in line.get_xydata()]
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert all(left <= x <= right and low <= y <= high for x, y in points), "nothing is cut off"
        assert low <= 0


def test_the_same_gives_the_same_bytes_and_matplotlibs_settings_do_not_matter(tmp_path, images):
    import matplotlib

    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    drawn(tmp_path / "a.png", log, [example(images, 2)])
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "lines.linewidth": 9}):
        drawn(tmp_path / "b.png", log, [example(images, 2)])
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


CAPTIONS = [
    "", "x" * 500, "一只棕色的狗在草地上奔跑" * 9, "two\nlines\tand\r\nmore", "мальчик 🐕 e\u0301 \u202eכלב",
    "many words " * 99, "costs $5 or $\\frac{6$ {", "W" * 90, "nul \x00 and bell \x07",
]  # fmt: skip


def test_any_caption_can_be_drawn(tmp_path, images):
    examples = [example(images, 9, caption) for caption in CAPTIONS]
    figure, _ = drawn(tmp_path / "report.png", [{"step": 1, "loss": 1.0}], examples, CAPTIONS[2])
    assert "costs $5 or $\\frac{6$ {" in [text.get_text().replace("\n", " ") for text in figure.texts]


@styled()
def wrapped(caption: str, inches: float, lines: int) -> str:
    label = new_figure(WIDTH, 2).text(0, 0, "")
    fit(label, caption, inches, lines)
    assert label.get_window_extent().width <= inches * label.figure.dpi
    return label.get_text()


def test_captions_are_wrapped_to_the_width_and_cut_with_dots():
    for caption in CAPTIONS:
        assert wrapped(caption, 2, 4).count("\n") <= 3
    assert wrapped("a small red circle", 2, 4) == "a small red circle"
    assert wrapped("two  small\nred circles", 0.8, 4) == "two small\nred circles"
    assert wrapped("many words " * 99, 2, 3).endswith("...")
    assert wrapped("x" * 60, 1, 99).replace("\n", "") == "x" * 60


@pytest.mark.parametrize("top", [0.09, 0.78, 0])
def test_a_sweep_shows_each_alpha_and_the_best(tmp_path, top):
    found = [
        {"alpha": alpha, "new": {"mean_recall": top * alpha}, "old": {"mean_recall": top * (1 - alpha**2) / 2}}
        for alpha in (0, 0.5, 1)
    ]
    figure = draw_sweep(tmp_path / "sweep.png", found, 0.5, "before to after")
    both, over = figure.axes
    line, best = both.lines
    points = [[entry[task]["mean_recall"] for task in ("old", "new")] for entry in found]
    assert line.get_xydata().tolist() == points and best.get_xydata().tolist() == points[1:2]
    assert [text.get_text() for text in both.texts] == ["0", "0.5, best mean", "1"]
    for line, task in zip(over.lines, ("new", "old"), strict=True):
        assert line.get_label() == f"{task} task"
        assert line.get_xydata().tolist() == [[entry["alpha"], entry[task]["mean_recall"]] for entry in found]
    (low, high), (left, right) = both.get_ylim(), both.get_xlim()
    assert all(left < x < right and low < y < high for x, y in points)
    assert Image.open(tmp_path / "sweep.png").width == 2360
