"""docs/learn/clip.html: its numbers are the model's, and in Chromium it computes and shows what the library does."""

import base64
import importlib.util
import json
import os
import re
import shutil

import pytest
import torch

import miniclip
from miniclip.tokenizer import load_table
from tests.conftest import ROOT

LEARN = ROOT / "docs" / "learn"
HTML = (LEARN / "clip.html").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("learn_page", LEARN / "page.py")
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)
DATA = maker.read(HTML)
BROWSER = importlib.util.find_spec("playwright") is not None and shutil.which("chromium") is not None
MUST = bool(os.environ.get("MINICLIP_UI"))  # make test-ui: what is missing is a failure there
NORMALIZE = miniclip.Preprocess(miniclip.MiniClipConfig.from_json(LEARN / "small.json").preprocess_cfg).normalize


def cosines(name: str) -> torch.Tensor:
    return torch.tensor(DATA[name]["image"]) @ torch.tensor(DATA[name]["text"]).T


def loss(name: str, scale: float) -> float:
    image, text = (torch.tensor(DATA[name][part]) for part in ("image", "text"))
    return miniclip.clip_loss(image, text, torch.tensor(scale)).item()


def pixels(scene: int | str) -> torch.Tensor:
    """The levels (3, size, size) of a scene of the page, or of those encoded as there."""
    encoded = scene if isinstance(scene, str) else DATA["scenes"][scene]["pixels"]
    return torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8).view(3, DATA["size"], DATA["size"])


def test_it_is_the_template_with_the_numbers_of_the_untrained_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    template = (LEARN / "clip.template.html").read_text(encoding="utf-8")
    assert maker.fill(template, DATA) == HTML, "run python docs/learn/page.py --keep"
    again, kept = json.loads(json.dumps(maker.untrained()[1])), maker.read(HTML)
    before, _, _ = again.pop("before"), kept.pop("before"), kept.pop("after")
    for scene, drawn in enumerate(again["scenes"]):  # edges may be drawn a little differently by another Pillow
        assert (pixels(scene).float() - pixels(drawn.pop("pixels")).float()).abs().mean() < 1
        kept["scenes"][scene].pop("pixels")
    assert again == kept, "run python docs/learn/page.py"
    for name in ("image", "text"):
        torch.testing.assert_close(torch.tensor(before[name]), torch.tensor(DATA["before"][name]), atol=5e-3, rtol=0)
    right, pairs = cosines("after").diagonal(), ~torch.eye(len(DATA["scenes"]), dtype=bool)
    assert right.mean() > 0.7 and cosines("after")[pairs].mean() < 0.3 and abs(cosines("before").mean()) < 0.1


@pytest.mark.slow
def test_training_leads_to_its_numbers(monkeypatch):
    monkeypatch.chdir(ROOT)
    again = maker.trained()["after"]
    found = torch.tensor(again["image"]) @ torch.tensor(again["text"]).T
    assert (found - cosines("after")).abs().mean() < 0.1
    assert abs(again["scale"] - DATA["after"]["scale"]) < 1


def test_it_is_one_small_file_in_two_languages_that_loads_nothing():
    assert len(HTML.encode()) < 400_000
    assert not re.search(r"https?://|@import|<link rel=.stylesheet|\bsrc=|fetch\(", HTML)
    assert "default-src 'none'" in HTML
    for target in re.findall(r'href="([^"#]+)"', HTML):
        assert target.startswith("data:") or (LEARN / target).is_file(), target
    body = HTML[HTML.index("<body>") : HTML.index('<script type="application/json"')]
    assert body.count('lang="en"') == body.count('lang="zh-CN"') > 10


@pytest.fixture(scope="module")
def chromium():
    if not (BROWSER or MUST):
        pytest.skip("playwright or Chromium is not installed: make test-ui")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens the page; at the end it must have asked for nothing but itself, and raised nothing."""
    asked, faults = [], []

    def visit(locale="en-US", width=1200, **options):
        page = chromium.new_page(locale=locale, viewport={"width": width, "height": 900}, **options)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.goto((LEARN / "clip.html").as_uri())
        return page

    yield visit
    assert not faults and {url for url in asked if not url.startswith("data:")} == {(LEARN / "clip.html").as_uri()}


def test_loss_and_softmax_follow_the_temperature(visit):
    page = visit()
    cells = page.locator("#softmax td:not(.loss)")
    for name in ("before", "after"):
        page.click(f"[data-model={name}]")
        shown = [float(text.replace("−", "-")) for text in page.locator("#cosines td:not(.loss)").all_inner_texts()]
        torch.testing.assert_close(torch.tensor(shown).view(8, 8), cosines(name), atol=0.0051, rtol=0)
        for temperature in (1, 0.25, 0.07, 0.01):
            move = "(slider, t) => { slider.value = Math.log(1 / t); slider.dispatchEvent(new Event('input')); }"
            page.locator("#temperature").evaluate(move, temperature)
            assert abs(float(page.inner_text("#loss b")) - loss(name, 1 / temperature)) < 1e-4
            assert page.inner_text("#scale") == f"{temperature:.3f} (× {1 / temperature:.2f})"
            for dim, direction in ((1, "rows"), (0, "columns")):
                page.click(f"[data-direction={direction}]")
                percent = torch.tensor([float(text[:-1]) for text in cells.all_inner_texts()]).view(8, 8)
                wanted = 100 * (cosines(name) / temperature).softmax(dim)
                torch.testing.assert_close(percent, wanted, atol=0.51, rtol=0)
        for button, scale in (("learned", DATA["after"]["scale"]), ("start", DATA["before"]["scale"]), ("100", 100)):
            page.click(f"[data-scale='{button}']")
            assert abs(float(page.inner_text("#loss b")) - loss(name, scale)) < 1e-4
    page.locator("#cosines td:not(.loss)").nth(8 * 2 + 5).hover()
    assert DATA["scenes"][5]["caption"] in (said := page.inner_text("#cell")) and "a negative" in said
    assert f"p(caption) = {(100 * cosines('after')).softmax(1)[2, 5]:.4f}" in said
    page.keyboard.press("Tab")
    page.locator("#cosines").focus()
    page.keyboard.press("ArrowLeft")
    assert DATA["scenes"][4]["caption"] in page.inner_text("#cell")


def test_patch_and_token_under_the_mouse(visit):
    page = visit()
    size, patch = DATA["size"], DATA["patch"]
    for scene, x, y in ((0, 5, 3), (3, 37, 50), (7, 63, 63)):
        page.locator("#scenes button").nth(scene).click()
        box = page.locator("#image").bounding_box()
        cell = box["width"] / size
        page.locator("#image").hover(position={"x": (x + 0.5) * cell, "y": (y + 0.5) * cell})
        normal = NORMALIZE(pixels(scene))
        patches = normal.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4)  # row, column, channel
        sequence = patches.flatten(2).flatten(0, 1)
        position = 1 + y // patch * (size // patch) + x // patch
        said = page.inner_text("#pixel")
        assert f"row {y // patch + 1}, column {x // patch + 1}: position {position} of" in said
        assert "red, green, blue " + ", ".join(str(v) for v in pixels(scene)[:, y, x].tolist()) in said
        indices = [int(number) for number in re.search(r"numbers ([\d, ]+) of", said)[1].split(",")]
        shown = [float(v) for v in re.search(r"normalised (.*)\.$", said)[1].replace("−", "-").split(",")]
        torch.testing.assert_close(sequence[position - 1, indices], torch.tensor(shown), atol=6e-4, rtol=0)
        torch.testing.assert_close(normal[:, y, x], torch.tensor(shown), atol=6e-4, rtol=0)
        assert page.locator("#sequence [aria-pressed=true]").inner_text() == str(position)
        tokens = page.locator("#tokens button")
        ids = miniclip.Tokenizer()([DATA["scenes"][scene]["caption"]], trim=True)[0].tolist()
        assert [int(text) for text in page.locator("#tokens small").all_inner_texts()] == ids
        for number in (0, 4, len(ids) - 1):
            tokens.nth(number).hover()
            assert f"Position {number}, id {ids[number]}: " in page.inner_text("#token")
            assert page.locator("#tokens .seen").count() == number + 1
        assert "the end token" in page.inner_text("#token")
    page.locator("#sequence button").first.hover()
    assert "the class token" in page.inner_text("#pixel")
    page.locator("#scenes button").nth(4).click()
    page.locator("#tokens .more").first.hover()
    assert "rhombus" in page.inner_text("#token")
    steps = page.locator("#token li").all_inner_texts()
    assert steps[0].split() == list("rhombu") + ["s_"] and steps[-1].startswith("r hom bus_ ← 2840")
    assert load_table()[2][2840] == b"bus "


@pytest.mark.parametrize(("locale", "width", "scheme"), [("zh-CN", 375, "dark"), ("en-US", 320, "light")])
def test_both_languages_on_a_phone(visit, locale, width, scheme):
    page = visit(locale, width, color_scheme=scheme, has_touch=True)
    chinese = locale == "zh-CN"
    assert page.evaluate("Object.keys(SAY.en).join()") == page.evaluate("Object.keys(SAY['zh-CN']).join()")
    for language in (chinese, not chinese):
        assert page.evaluate("document.documentElement.lang") == ("zh-CN" if language else "en")
        for selector in ("#cosines td.right", "#sequence button", "#tokens button"):
            page.locator(selector).nth(5).tap()
        page.locator("#image").tap(position={"x": 200, "y": 90})
        text = page.inner_text("body")
        assert ("相似度与温度" in text, "Similarity and temperature" in text) == (language, not language)
        assert ("场景 6 × 描述 6: 配对" in text, "Patch in row" in text) == (language, not language)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.tap("#language")  # a mouse left there would point at what scrolls below it
