"""The HTML report: its numbers are those of the pairs, its queries the right ones, and the page needs nothing else."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniclip.reports import html_page
from miniclip.reports.contact_sheet import thumbnail
from miniclip.reports.html_page import Evaluation, depths, write_report
from miniclip.reports.similarities import (
    BINS,
    chance_curve,
    histogram,
    overlap,
    recall_curve,
    roc_auc,
    similarities,
    worst_and_best,
)  # fmt: skip
from miniclip.retrieval import metrics_of, rank_of_first_relevant, retrieval_metrics, search_both

KS = (1, 5, 10)
RECORD = {
    "command": "python evaluate.py --model runs/mine", "folder": "/home/me", "started": "2026-11-21T19:43:05+00:00",
    "commit": "abc", "versions": {"python": "3.11.7", "torch": None}, "machine": {"device": "cpu: a processor"},
    "precision": "fp32", "options": {"num_workers": 0, "captions": "all"},
}  # fmt: skip
EMPTY = {"meta", "img", "line", "rect", "circle", "polyline", "polygon"}


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def vectors(n: int, each: int, noise: float = 0.5, width: int = 16):
    """n images with `each` captions, which are their image and some noise."""
    rng = np.random.default_rng(n + each)
    image_of_text = np.repeat(np.arange(n), each)
    image = unit(rng.standard_normal((n, width)))
    return image, unit(image[image_of_text] + noise * rng.standard_normal((n * each, width)) / 2), image_of_text


class Page(HTMLParser):
    """A page taken apart. Fails where elements are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[dict]:
        return [attrs for tag, attrs in self.elements if tag == name]


def pictures(folder, n: int) -> list[str]:
    for i in range(n):
        Image.new("RGB", (40, 30), (10 * i % 256, 100, 200)).save(folder / f"p{i}.png")
    return [str(folder / f"p{i}.png") for i in range(n)]


def evaluation(
    folder, image, text, image_of_text, texts=None, temperature=None, log_history=(), images=None, notes=()
) -> Evaluation:
    results = search_both(image, text, image_of_text, max(KS))
    images = images or pictures(folder, len(image))
    texts = texts or [f"caption number {m} end" for m in range(len(text))]
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "trainer_state.json").write_text(json.dumps({"log_history": list(log_history)}))
    what = (images, texts, image, text, image_of_text, results, metrics_of(results, KS), RECORD, temperature, notes)
    return Evaluation(str(folder / "run"), "val.json", *what)


def written(folder, *args, **kwargs) -> tuple[Page, str]:
    path = write_report(folder / "new", evaluation(folder, *args, **kwargs))
    assert path == folder / "new" / "report.html"
    text = path.read_text(encoding="utf-8")
    return Page(text), text


TEMPERATURE = {"scale": 20.0, "bias": None, "start": 1 / 0.07}


def test_recall_and_chance_by_hand():
    assert recall_curve(np.array([1, 3, 3, 7]), [1, 2, 3, 6, 7]).tolist() == [0.25, 0.25, 0.75, 0.75, 1]
    assert chance_curve(4, np.array([1, 1])).tolist() == [0.25, 0.5, 0.75, 1]
    # two right ones of four: both are missed by the first answer in 1/2, by the first two in 1/6 of all orders
    assert chance_curve(4, np.array([2])) == pytest.approx([1 / 2, 5 / 6, 1, 1])
    assert chance_curve(4, np.array([1, 2])) == pytest.approx([3 / 8, 4 / 6, 7 / 8, 1])
    assert (depths(1), depths(2), depths(600)) == ([1], [1, 2], [1, 5, 10, 50, 100, 500, 600])


def test_the_curve_goes_through_the_metrics():
    embeds = vectors(60, 3)
    searched, metrics = search_both(*embeds, 10), retrieval_metrics(*embeds)
    assert metrics_of(searched) == metrics
    for way in ("text_to_image", "image_to_text"):
        assert recall_curve(searched[way].ranks, KS) == pytest.approx([metrics[f"{way}_R@{k}"] for k in KS])
        assert 0 < metrics[f"{way}_R@1"] < 1, "a case that tells"


def test_histogram_by_hand():
    counts = histogram(np.array([-1.0000001, -1, 0, 0.0005, 0.5, 0.9999, 1, 1.0000001], np.float32))
    found = {int(b): int(counts[b]) for b in np.flatnonzero(counts)}
    assert found == {0: 2, 1000: 2, 1500: 1, 1999: 3}
    # three matching pairs, two others: of six comparisons one is lost, one is even
    matching, others = histogram(np.array([0.5, 0.7, 0.1])), histogram(np.array([0.1, 0.3]))
    assert roc_auc(matching, others) == pytest.approx(4.5 / 6)
    assert overlap(matching, others) == pytest.approx(1 / 3)


@pytest.mark.parametrize("memory", [1, 5000, 1 << 25])
def test_blocks_give_what_the_whole_matrix_gives(memory):
    image, text, image_of_text = vectors(41, 3)
    alike = similarities(image, text, image_of_text, 20.0, memory)
    scores = text @ image.T
    right = image_of_text[:, None] == np.arange(41)
    assert alike.right == pytest.approx(scores[right], abs=1e-6)
    assert alike.matching.sum() == 123 and alike.others.sum() == 123 * 40
    # products of other shapes differ in their last bits, which takes a pair into the next bin now and then
    for counts, values in ((alike.matching, scores[right]), (alike.others, scores[~right])):
        assert np.abs(counts.cumsum() - histogram(values).cumsum()).max() <= 1
    assert alike.means == pytest.approx((scores[right].mean(), scores[~right].mean()), abs=1e-6)
    wrong = np.where(right, -np.inf, scores)
    assert alike.wrong_image == pytest.approx(wrong.max(1), abs=1e-6)
    assert alike.wrong_text == pytest.approx(wrong.max(0), abs=1e-6)
    p = np.exp(20 * scores) / np.exp(20 * scores).sum(1, keepdims=True)
    assert alike.p_right == pytest.approx(p[right], rel=1e-4) and alike.p_first == pytest.approx(p.max(1), rel=1e-4)


def test_exact_vectors_fall_into_the_same_bins_in_any_block():
    rng = np.random.default_rng(0)
    image, text = (rng.choice([-0.5, 0.5], (n, 4)).astype(np.float32) for n in (7, 21))  # cosines -1, -0.5, ... 1
    image_of_text = np.repeat(np.arange(7), 3)
    whole = similarities(image, text, image_of_text)
    for memory in (1, 4 * 7 * 5):
        part = similarities(image, text, image_of_text, memory=memory)
        assert (part.matching == whole.matching).all() and (part.others == whole.others).all()
    scores, right = text @ image.T, image_of_text[:, None] == np.arange(7)
    for value in (-1, -0.5, 0, 0.5, 1):
        place = min(int((value + 1) * BINS / 2), BINS - 1)
        assert whole.others[place] == (scores[~right] == value).sum()
        assert whole.matching[place] == (scores[right] == value).sum()


def test_worst_and_best_by_hand():
    ranks = np.array([1, 9, 4, 9, 1, 9, 2])
    margins = np.array([0.2, -0.1, -0.3, -0.4, 0.5, -0.2, -0.1])
    image = np.array([0, 1, 2, 3, 4, 3, 5])
    worst, best = worst_and_best(ranks, margins, image, 8, 4)
    assert worst == [3, 1, 2, 6], "5 is of the same image as 3, which lost by more"
    assert best == [4, 0], "only those found first"
    assert worst_and_best(ranks, margins, image, 2, 1) == [[3, 1], [4]]
    assert worst_and_best(np.ones(3, int), np.zeros(3), np.arange(3), 4, 4)[0] == []
    assert worst_and_best(np.full(3, 2), np.zeros(3), np.arange(3), 4, 4)[1] == []


def test_ranks_and_cosines_are_those_of_retrieval(tmp_path):
    image, text, image_of_text = vectors(40, 2, noise=1.6)
    page, _ = written(tmp_path, image, text, image_of_text)
    ranks = rank_of_first_relevant(image, text, list(image_of_text[:, None]))
    scores = text @ image.T
    captions, pictures = page.text.split("Image to text: images as queries")
    shown = re.findall(r"caption number (\d+) end correct result at rank (\d+) of 40 (.*?)(?=caption|Best)", captions)
    assert len(shown) == html_page.WORST
    assert len({int(m) // 2 for m, _, _ in shown}) == len(shown), "of different images"
    assert int(shown[0][1]) == ranks.max() and [int(r) for _, r, _ in shown] == [ranks[int(m)] for m, _, _ in shown]
    for m, rank, found in shown:
        row = scores[int(m)]
        places = re.findall(r"\b(\d+)\s?(-?\d\.\d{3})( ?✓ correct)?", found)
        assert [float(score) for _, score, _ in places[:5]] == pytest.approx(np.sort(row)[::-1][:5], abs=6e-4)
        (marked,) = [place for place in places if place[2]]
        assert marked[0] == rank and float(marked[1]) == pytest.approx(row[image_of_text[int(m)]], abs=6e-4)
        assert len(places) == 5 + (int(rank) > 5)
    ranks = rank_of_first_relevant(text, image, [np.array([2 * n, 2 * n + 1]) for n in range(40)])
    shown = re.findall(r"p(\d+)\.png correct result (?:at rank )?(\d+|first)(.*?)(?=p\d+\.png|$)", pictures)
    shown = [(n, "1" if rank == "first" else rank, found) for n, rank, found in shown]
    assert len(shown) == html_page.WORST + html_page.BEST and int(shown[0][1]) == ranks.max()
    for n, rank, found in shown:
        row = scores[:, int(n)]
        places = re.findall(r"(\d+) (✓ correct )?caption number (\d+) end (-?\d\.\d{3})", found)
        assert int(rank) == ranks[int(n)] and len(places) == 5 + (int(rank) > 5)
        assert [int(m) for _, _, m, _ in places[:5]] == np.argsort(-row)[:5].tolist()
        assert all(float(score) == pytest.approx(row[int(m)], abs=6e-4) for _, _, m, score in places)
        assert all(bool(mark) == (int(m) // 2 == int(n)) for _, mark, m, _ in places)
        place, score = next((place, float(score)) for place, mark, _, score in places if mark)
        assert place == rank and score == pytest.approx(row[2 * int(n) : 2 * int(n) + 2].max(), abs=6e-4)


def test_metrics_counts_and_temperature_are_on_the_page(tmp_path):
    embeds = vectors(30, 2)
    metrics, alike = retrieval_metrics(*embeds), similarities(*embeds, 20.0)
    log = [{"step": step, "loss": 3 / step, "eval_text_to_image_R@1": step / 100} for step in (10, 20, 30)]
    page, _ = written(tmp_path, *embeds, temperature=TEMPERATURE, log_history=log)
    for way in ("text_to_image", "image_to_text"):
        cells = [f"{100 * metrics[f'{way}_R@{k}']:.1f}" for k in KS]
        assert " ".join([way.replace("_", " "), *cells]) in page.text
    # Among 30, one of them right: 15.5 on average, the mean of 1 / rank 3.995 / 30. Among 60, two: 61 / 3.
    assert "by chance 3.3 16.7 33.3 15 15.5 0.133" in page.text
    assert re.search(r"by chance 3\.3 16\.1 30\.8 \d+ 20\.3 ", page.text)
    for way in ("text_to_image", "image_to_text"):
        cells = [f"{100 * metrics[f'{way}_{kind}@{k}']:.1f}" for kind in ("recall", "precision") for k in KS]
        assert " ".join([way.replace("_", " "), *cells]) in page.text
    # Among 30, one right: 1/30, 5/30, 10/30 of them found, and always 1/30 of those shown. Among 60, two.
    assert "by chance 3.3 16.7 33.3 3.3 3.3 3.3" in page.text and "by chance 1.7 8.3 16.7 3.3 3.3 3.3" in page.text
    first, right = 100 * alike.p_first.mean(), 100 * metrics["text_to_image_R@1"]
    assert f"ranks first gets {first:.1f}% on average and is correct in {right:.1f}%" in page.text
    assert (
        "60 matching pairs" in page.text and "1,740 other pairs" in page.text and "30 images, 60 captions" in page.text
    )
    assert f"ROC AUC is {100 * roc_auc(alike.matching, alike.others):.2f}%" in page.text
    assert "0.0500" in page.text and "0.0700" in page.text and "limit in training" in page.text
    assert f"a mean probability of {100 * alike.p_right.mean():.1f}% (chance 3.33%)" in page.text
    assert "21 November 2026, 19:43 UTC" in page.text and RECORD["command"] in page.text
    assert "Training loss" in page.text
    assert "options num_workers 0" in page.text, "a zero is a value too"


def test_what_was_not_logged_is_neither_drawn_nor_explained(tmp_path):
    losses = [{"step": step, "loss": 3 / step} for step in (10, 20)]
    recalls = [{"step": step, "eval_text_to_image_R@1": step / 100} for step in (10, 20)]
    for log, drawn in (losses, "l"), (recalls, "r"), (losses + recalls[:1], "l"), (losses + recalls, "lr"):
        page, _ = written(tmp_path, *vectors(6, 1), log_history=log)
        assert ("Training loss" in page.text) == ("l" in drawn)
        assert ("R@1 over training" in page.text) == ("r" in drawn)
        assert ("evaluation set used in training" in page.text) == ("r" in drawn)


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_lone_chart_is_no_larger_than_others(tmp_path):
    written(tmp_path, *vectors(6, 1), log_history=[{"step": step, "loss": 3 / step} for step in (10, 20)])
    path = tmp_path / "new" / "report.html"
    measure = "document.title = [...document.querySelectorAll('.chart')].map(x => Math.round(x.clientWidth)).join()"
    html = path.read_text(encoding="utf-8").replace("default-src 'none'", "script-src 'unsafe-inline'")
    path.write_text(html.replace("</body>", f"<script>{measure}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1280,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom",
         path.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    widths = re.search(r"<title>([\d,]+)</title>", done.stdout)[1].split(",")
    assert len(widths) == 3 and len(set(widths)) == 1 and 400 < int(widths[0]) < 560, widths


def test_a_siglip_model_has_a_bias(tmp_path):
    page, _ = written(tmp_path, *vectors(9, 1), temperature={"scale": 10.0, "bias": -5.0, "start": 10.0})
    assert "matches above a cosine of 0.500" in page.text and "-5.00" in page.text and "softmax" not in page.text
    image, text, image_of_text = vectors(9, 1)
    shares = 1 / (1 + np.exp(5 - 10 * (text @ image.T)))
    own = np.zeros((9, 9), bool)
    own[np.arange(9), image_of_text] = True
    told = re.search(r"a mean probability of ([\d.]+)% , other pairs ([\d.]+)%", page.text)
    wanted = [100 * shares[own].mean(), 100 * shares[~own].mean()]
    assert [float(x) for x in told.groups()] == pytest.approx(wanted, abs=0.1)


@pytest.mark.parametrize("n", [40, 300])
def test_pairs_that_differ_in_nothing_have_one_histogram(tmp_path, n):
    rng = np.random.default_rng(n)
    image, text = (rng.standard_normal((n, 32)).astype(np.float32) for _ in range(2))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    page, _ = written(tmp_path, image, text, np.arange(n), notes=("2 bad samples were skipped",))
    assert float(re.search(r"overlap by ([\d.]+)% of their area", page.text)[1]) > 70
    assert f"{n} images, {n} captions; 2 bad samples were skipped" in page.text


def test_without_a_model_there_is_no_temperature(tmp_path):
    page, _ = written(tmp_path, *vectors(9, 1))
    assert "Evaluated without a model" in page.text and "Recall curves" in page.text and "Training" not in page.text


NASTY = [
    "<script>alert(1)</script>", "\"quoted\" & 'so' <img src=x onerror=y>", "\u202eכלב רץ בשלג", "一只棕色的狗",
    "{title} %s {0}", "x" * 5000, "&lt;b&gt; TITLE STYLE", "two\nlines \x0b \x00",
]  # fmt: skip


def test_any_text_and_any_picture(tmp_path):
    files = pictures(tmp_path, 8)
    os.remove(files[0])
    (tmp_path / "p1.png").write_text("no picture")
    odd = tmp_path / "a\"b<i>'&.png"
    os.rename(files[2], odd)
    files[2] = str(odd)
    image, text, image_of_text = vectors(8, 1, noise=3)
    page, html = written(tmp_path, image, text, image_of_text, texts=NASTY, images=files)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "i", "b>", "iframe", "link", "object", "form"})
    assert all(text in page.text or len(text) > 400 or "\n" in text for text in NASTY[:6])
    assert "p0.png: no such file" in page.text and "p1.png: not an image in a supported format" in page.text
    assert "x" * 397 + "..." in page.text and "x" * 401 not in html
    assert any(attrs["alt"].startswith("a\"b<i>'&.png: ") for attrs in page.all("img"))
    assert html.count(str(tmp_path)) == html.count(str(tmp_path / "run")), "where pictures lie is nobody's business"


def test_the_page_needs_no_other_file_and_is_accessible(tmp_path):
    log = [{"step": step, "loss": 3 / step} for step in (10, 20)]
    page, html = written(tmp_path, *vectors(12, 2, noise=2), temperature=TEMPERATURE, log_history=log)
    for tag, attrs in page.elements:
        for name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"} & set(attrs):
            assert attrs[name].startswith(("data:image/jpeg;base64,", "#")), (tag, name)
        assert not any(name.startswith("on") for name in attrs)
    css = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in css and "url(" not in css and "http" not in css
    policy = next(attrs for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert dict(page.all("html")[0])["lang"] == "en" and all(attrs["alt"] for attrs in page.all("img"))
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    charts = [attrs for attrs in page.all("svg") if attrs.get("class") == "chart"]
    assert len(charts) == len(page.all("title")) - 1 == len(page.all("desc")) == 3
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', html))
    assert len(ids) == len(set(ids)) and used and used <= set(ids)
    drawn = "".join(re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL))
    assert not re.search("#[0-9a-f]{6}", drawn) and "var(--ink)" in drawn, "colours follow the dark mode"
    assert "training step" in page.text and "24 matching pairs" in page.text and "by chance" in page.text
    assert "prefers-color-scheme: dark" in css and "@media print" in css and "break-inside: avoid" in css


def test_pictures_leave_behind_what_is_not_seen(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    Image.new("RGB", (500, 400), "red").save(tmp_path / "a.jpg", comment=b"a secret" * 5000, exif=exif)
    file = base64.b64decode(thumbnail(tmp_path / "a.jpg", 224).split(",")[1])
    assert Image.open(io.BytesIO(file)).size == (224, 179) and b"secret" not in file and len(file) < 5000


def test_the_same_gives_the_same_bytes(tmp_path):
    embeds = vectors(10, 2)
    first, second = (written(tmp_path, *embeds, temperature=TEMPERATURE)[1] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("n, each", [(1, 1), (1, 3), (2, 1), (12, 1)])
def test_small_and_equal_sets(tmp_path, n, each):
    image, text, image_of_text = vectors(n, each)
    page, _ = written(tmp_path, image, text, image_of_text, temperature=TEMPERATURE)
    assert not re.search(r"\b(nan|inf)\b", page.text)
    assert n > 1 or "There are no other pairs" in page.text and "there is no wrong one" in page.text
    same = (unit(np.ones((len(x), 16))) for x in (image, text))
    page, _ = written(tmp_path, *same, image_of_text, temperature=TEMPERATURE)
    assert n == 1 or f"correct result at rank {n} of {n}" in page.text, "the last row, of equal ones"


def test_what_a_model_writes_of_some_pictures(tmp_path):
    image, text, image_of_text = vectors(30, 7)
    e, asked = evaluation(tmp_path, image, text, image_of_text), []
    rows = [0, 3, 5, 8, 11, 13, 16, 18, 21, 24, 26, 29]
    os.remove(e.images[8])
    write = lambda images: asked.extend(images) or [f"<i>{Path(path).stem}" for path in images]  # noqa: E731
    section = Page(html_page.written_section(replace(e, write=write)))
    assert asked == [e.images[row] for row in rows if row != 8]
    assert len(section.all("img")) == 11 and "of 11 images at equal steps through the 30" in section.text
    said = f"<i>p3 {' '.join(f'caption number {m} end' for m in range(21, 26))} and 2 more <i>p5"
    assert said in section.text
    assert html_page.written_section(replace(e, write=list, images=["gone.png"] * 30)) == ""


def test_where_it_is_written(tmp_path):
    image, text, image_of_text = vectors(5, 1, noise=1)
    e = evaluation(tmp_path, image, text, image_of_text)
    for given, written in ("x", "x/report.html"), ("x/", "x/report.html"), ("x/report.html", "x/report.html"), (
        "a.PNG", "a.PNG"), ("a.htm", "a.htm"), ("v1.2", "v1.2/report.html"):  # fmt: skip
        assert write_report(f"{tmp_path}/{given}", e) == tmp_path / written and (tmp_path / written).stat().st_size


@pytest.fixture
def features(caption_set):
    image, text, _ = vectors(24, 2, noise=1)
    np.save(caption_set / "image.npy", image)
    np.save(caption_set / "text.npy", text)
    return caption_set


def test_features_without_a_model(features, run_script):
    (features / "3.png").write_bytes(b"damaged")
    common = ["evaluate.py", "--features", features, "--eval_file", features / "captions.json"]
    done = run_script(*common, "--output_file", features / "o.json", "--report", features / "new" / "folder")
    assert f"the report is {features / 'new' / 'folder' / 'report.html'}" in done.stdout
    page = Page((features / "new" / "folder" / "report.html").read_text(encoding="utf-8"))
    result = json.loads((features / "o.json").read_text())
    assert f"{100 * result['metrics']['mean_recall']:.1f}" in page.text and "Evaluated without a model" in page.text
    assert result["record"]["command"] in page.text
    assert result["record"]["sha256"][str(features / "image.npy")] in page.text
    common += ["--output_file", features / "o.json"]
    done = run_script(*common, "--captions", "first", "--report", features / "one.html")
    page = Page((features / "one.html").read_text(encoding="utf-8"))
    assert "24 images, 24 captions" in page.text and "R@3" in page.text and "paper, tall" not in page.text
    done = run_script(*common, "--report", features / "o.json", check=False)
    assert done.returncode != 0 and "o.json is a file" in done.stderr


def test_a_model_from_end_to_end(caption_set, tiny_model, run_script):
    model = caption_set / "model"
    tiny_model.save_pretrained(model)
    (model / "trainer_state.json").write_text(json.dumps({"log_history": [
        {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_text_to_image_R@1": 0.1}, {"step": 3, "loss": None},
    ]}))  # fmt: skip
    common = ["evaluate.py", "--model", model, "--eval_file", caption_set / "captions.json"]
    run_script(*common, "--report", caption_set)
    page = Page((caption_set / "report.html").read_text(encoding="utf-8"))
    assert "0.0700" in page.text and "14.29" in page.text and "Training loss" in page.text and "torch" in page.text
    assert page.text.count("✓ correct") >= 8 and len(page.all("img")) > 40
    assert "What the model writes" not in page.text, "it cannot"
    run_script(*common, "--report", caption_set / "picture.png")
    assert Image.open(caption_set / "picture.png").format == "PNG"


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_it_prints_and_asks_for_nothing(tmp_path):
    written(tmp_path, *vectors(20, 2, noise=2), temperature=TEMPERATURE)
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--no-pdf-header-footer",
         "--enable-logging=stderr", f"--log-net-log={tmp_path / 'net.json'}", f"--print-to-pdf={tmp_path / 'page.pdf'}",
         (tmp_path / "new" / "report.html").as_uri()],
        capture_output=True, timeout=600, check=True,
    )  # fmt: skip
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(pdf) > 30_000
    counts = re.findall(rb"/Type\s*/Pages[^>]*?/Count (\d+)|/Count (\d+)[^>]*?/Type\s*/Pages", pdf)
    assert 4 <= max(int(a or b) for a, b in counts) <= 14, "pages of A4"
    asked = re.findall(r'"url":"(https?:[^"]*)"', (tmp_path / "net.json").read_text(errors="replace"))
    assert not [url for url in asked if not re.search(r"google|gvt1", url)], "but for the browser's own housekeeping"
    if shutil.which("pdftotext"):
        shown = subprocess.run(["pdftotext", tmp_path / "page.pdf", "-"], capture_output=True, text=True).stdout
        assert "Recall curves" in shown and "caption number" in shown and "Image to text: images as queries" in shown
