"""What did training look like?

One picture says it: the loss and Recall@K over training, and for a few captions the images that the model finds
for them, the right one marked. Drawn with Pillow alone, since it is here anyway.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from miniclip.utils.files import replacing

INK, GREY, GRID, PAPER, CELL = "#1f2328", "#6b7280", "#e3e6ea", "#ffffff", "#f1f3f5"
RED = "#c0392b"
GREEN = "#1a9850"  # the right image; it carries a tick mark too, for those who do not tell green from red
LINES = ["#1d4ed8", "#ea7a0c", "#8b3fc7", "#0f9f9a"]
# In points; a point is SHARPNESS pixels.
WIDTH, MARGIN, CHART, IMAGE, GAP, CAPTION = 1180, 32, 280, 124, 14, 274
SHARPNESS = 2
SHOWN = 5  # images per caption


@lru_cache
def load_font(pixels: float | None):
    return ImageFont.load_default(size=pixels)


class Page:
    """A sheet to draw on in points. It is drawn at twice its resolution and shrunk: smooth lines."""

    def __init__(self, height: float):
        # Pillow built without FreeType has one tiny font of pixels; then a point is a pixel and nothing is shrunk.
        self.freetype = features.check("freetype2")
        self.scale = 2 * SHARPNESS if self.freetype else 1
        self.image = Image.new("RGB", (WIDTH * self.scale, round(height * self.scale)), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def save(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            (self.image.reduce(2) if self.freetype else self.image).save(scratch)

    def _px(self, points: list) -> list:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def _font(self, size: float):
        return load_font(size * self.scale if self.freetype else None)

    def _drawable(self, text: str) -> str:
        return text if self.freetype else text.encode("latin-1", "replace").decode("latin-1")

    def text_width(self, text: str, size: float) -> float:
        return self.pen.textlength(self._drawable(text), font=self._font(size)) / self.scale

    def text(self, x: float, y: float, text: str, size: float = 12, fill: str = INK, align: float = 0) -> float:
        """Write one line with its top at y, starting (align 0), centred (0.5) or ending (1) at x. Gives its end."""
        width = self.text_width(text, size)
        x -= align * width
        self.pen.text((x * self.scale, y * self.scale), self._drawable(text), fill=fill, font=self._font(size))
        return x + width

    def line(self, points: list, fill: str, width: float = 1) -> None:
        self.pen.line(self._px(points), fill=fill, width=max(1, round(width * self.scale)), joint="curve")

    def dashes(self, left: float, right: float, y: float, fill: str) -> None:
        """A dashed level line."""
        for n in range(math.ceil((right - left) / 8)):
            self.line([(left + 8 * n, y), (min(left + 8 * n + 5, right), y)], fill)

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        self.pen.ellipse(self._px([(x - radius, y - radius), (x + radius, y + radius)]), fill=fill)

    def frame(self, x: float, y: float, w: float, h: float, outline: str | None, width: float, fill=None) -> None:
        self.pen.rounded_rectangle(self._px([(x, y), (x + w, y + h)]), radius=5 * self.scale, fill=fill,
                                   outline=outline, width=max(1, round(width * self.scale)))  # fmt: skip

    def paste(self, picture: Image.Image, x: float, y: float, side: float) -> None:
        """Put the whole picture, as large as fits, into the middle of a square."""
        factor = side * self.scale / max(picture.size)
        size = [max(1, round(length * factor)) for length in picture.size]
        corner = [round(p * self.scale + (side * self.scale - length) / 2) for p, length in zip((x, y), size)]
        self.image.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)

    def wrap(self, text: str, size: float, width: float, max_lines: int) -> list[str]:
        """Break text into lines of at most `width`, words longer than a line too, and say "..." where it is cut."""
        lines = [""]
        for word in text.split():
            if lines[-1] and self.text_width(f"{lines[-1]} {word}", size) > width:
                lines.append("")
            elif lines[-1]:
                lines[-1] += " "
            for letter in word:
                if lines[-1] and self.text_width(lines[-1] + letter, size) > width:
                    lines.append("")
                lines[-1] += letter
            if len(lines) > max_lines:
                return [*lines[: max_lines - 1], lines[max_lines - 1][:-3].rstrip() + "..."]
        return lines


def is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def curve(log_history: list[dict], key: str) -> list[tuple[float, float]]:
    """The (step, value) points logged under a key, in order of the step, without what is no finite number.

    Of several values at one step the first counts: an evaluation after training may be of an earlier, better model.
    """
    points: dict[float, float] = {}
    for entry in log_history:
        if is_finite(entry.get("step")) and is_finite(entry.get(key)):
            points.setdefault(entry["step"], entry[key])
    return sorted(points.items())


def ticks(top: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from 0 to the first one that is not below `top`."""
    power = 10.0 ** math.floor(math.log10(top / about))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power * about >= top * 0.999)
    return [i * gap for i in range(math.ceil(top / gap - 1e-9) + 1)]


def smooth(points: list, reach: int) -> list:
    """The running mean over `reach` neighbours on each side."""
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(step, sum(value for _, value in window) / len(window)) for (step, _), window in zip(points, windows)]


def draw_chart(
    page: Page, x: float, y: float, w: float, title: str, curves: dict, steps: float, note="", reference=None
) -> None:
    """Draw curves over training: {name: points}. Values are shares where the name starts with "R@", else losses.

    `reference` (name, value) is a level to compare them with, drawn as a dashed line.
    """
    left, top, right, bottom = x + 52, y + 62, x + w - 18, y + CHART - 44
    shares = all(name.startswith("R@") for name in curves)
    highest = max([value for points in curves.values() for _, value in points], default=1)
    highest = max(highest, reference[1]) if reference else highest
    y_ticks = ticks(1.0 if shares else max(highest, 1e-6))

    page.frame(x, y, w, CHART, GRID, 1)
    page.text(x + 16, y + 12, title, 15)
    for value in y_ticks:
        level = bottom - (bottom - top) * value / y_ticks[-1]
        page.line([(left, level), (right, level)], GREY if value == 0 else GRID)
        page.text(left - 8, level - 7, f"{value:.0%}" if shares else f"{value:g}", 11, GREY, align=1)
    for value in ticks(steps):
        if value <= steps and value == int(value):
            across = left + (right - left) * value / steps
            page.line([(across, bottom), (across, bottom + 4)], GREY)
            page.text(across, bottom + 7, f"{value:,.0f}", 11, GREY, align=0.5)
    page.text((left + right) / 2, bottom + 23, "training step", 11, GREY, align=0.5)

    legend = x + 16
    for (name, points), color in zip(curves.items(), LINES):
        if not points:
            continue
        legend_end = page.text(legend + 20, y + 36, f"{name}  {points[-1][1]:{'.1%' if shares else '.3g'}}", 12, INK)
        page.line([(legend, y + 43), (legend + 14, y + 43)], color, 3)
        legend = legend_end + 22
        noisy = len(points) > 40  # then the values are drawn thin, and their running mean over them
        for line, width in [(points, 0.5), (smooth(points, len(points) // 40), 2)] if noisy else [(points, 2)]:
            line = [(left + (right - left) * step / steps, bottom - (bottom - top) * max(0, value) / y_ticks[-1])
                    for step, value in line]  # fmt: skip
            page.line(line, color, width)
        for point in [] if noisy else line:
            page.dot(*point, 2.5, color)
    if reference:
        name, value = reference
        level = bottom - (bottom - top) * value / y_ticks[-1]
        page.dashes(left, right, level, GREY)
        page.dashes(legend, legend + 14, y + 43, GREY)
        page.text(legend + 20, y + 36, name, 12, GREY)
    if not any(curves.values()):
        page.text((left + right) / 2, (top + bottom) / 2 - 8, "nothing was logged", 13, GREY, align=0.5)
    page.text(x + w - 16, y + 14, note, 11, RED, align=1)


def draw_image(page: Page, x: float, y: float, path: str, right: bool, label: str, score: str) -> None:
    """Draw one image found, in a cell with a line below; the right one with a green frame and a tick mark."""
    from miniclip.utils.image_files import open_image

    page.frame(x, y, IMAGE, IMAGE, None, 0, fill=CELL)
    try:
        page.paste(open_image(path), x + 4, y + 4, IMAGE - 8)
    except (ValueError, OSError):
        page.text(x + IMAGE / 2, y + IMAGE / 2 - 7, "no image", 11, GREY, align=0.5)
    page.text(x + 3, y + IMAGE + 5, label, 12, GREEN if right else INK)
    page.text(x + IMAGE - 3, y + IMAGE + 5, score, 11, GREY, align=1)
    if right:
        page.frame(x - 1, y - 1, IMAGE + 2, IMAGE + 2, GREEN, 4)
        page.dot(x + IMAGE - 4, y + 4, 11, GREEN)
        page.line([(x + IMAGE - 9, y + 4), (x + IMAGE - 5.5, y + 8), (x + IMAGE + 1, y)], PAPER, 2.5)


def draw_example(page: Page, x: float, y: float, example: dict) -> None:
    """Draw a caption, the images it finds, best first, and the right image where it is not among those."""
    found, correct, rank = example["retrieved"][:SHOWN], str(example["correct"]), example["rank"]
    lines = page.wrap(example["caption"], 15, CAPTION - 24, 5)
    top = y + (IMAGE - 20 * len(lines) - 22) / 2
    for i, line in enumerate(lines):
        page.text(x, top + 20 * i, line, 15)
    verdict, color = ("found first", GREEN) if rank == 1 else (f"right image: rank {rank:,}", GREY)
    page.text(x, top + 20 * len(lines) + 6, verdict, 12, color)
    for place, (path, score) in enumerate(found):
        left = x + CAPTION + place * (IMAGE + GAP)
        draw_image(page, left, y, path, str(path) == correct, str(place + 1), f"{score:.3f}")
    if correct not in [str(path) for path, _ in found]:
        left = x + CAPTION + SHOWN * (IMAGE + GAP) + 2 * GAP
        page.line([(left - 1.5 * GAP, y), (left - 1.5 * GAP, y + IMAGE)], GRID)
        draw_image(page, left, y, correct, True, f"{rank:,}", "")


def pick_examples(images: list, captions: list, image_embeds, text_embeds, image_of_text) -> list[dict]:
    """Four captions and what each finds, for `draw_report`: three from all over the set, and one whose image is not
    found at once, if there is any. `captions[m]` belongs to image `image_of_text[m]`; embeddings as in `retrieval`."""
    import numpy as np

    from miniclip.retrieval import first_ranks, search

    ranks = first_ranks(image_embeds, text_embeds, list(np.asarray(image_of_text)[:, None]))
    rows = [int(len(captions) * share) for share in (0.1, 0.37, 0.64)]
    rows.append(int(np.argmax(ranks * (ranks <= SHOWN))))  # the worst that can still be shown among the others
    scores, found = search(image_embeds, text_embeds[rows], SHOWN)
    return [
        {
            "caption": captions[row],
            "retrieved": [(images[i], float(score)) for i, score in zip(found[n], scores[n])],
            "correct": images[image_of_text[row]],
            "rank": int(ranks[row]),
        }
        for n, row in enumerate(rows)
    ]


def draw_loss_and_recall(page: Page, y: float, log_history: list[dict], reference=None) -> float:
    """Draw the two charts side by side. Gives the last step, where they end; `reference` is for the loss."""
    names = " ".join(name for entry in log_history for name in entry)
    recall = sorted({int(k) for k in re.findall(r"eval_text_to_image_R@(\d+)\b", names)})
    curves = {f"R@{k}": curve(log_history, f"eval_text_to_image_R@{k}") for k in recall}
    loss = curve(log_history, "loss")
    steps = max([step for points in [loss, *curves.values()] for step, _ in points if step > 0], default=1)
    broken = sum("loss" in entry and not is_finite(entry["loss"]) for entry in log_history)
    note = f"not finite, left out: {broken}" if broken else ""
    half = (WIDTH - 2 * MARGIN - GAP) / 2
    draw_chart(page, MARGIN, y, half, "Training loss", {"loss": loss}, steps, note, reference)
    draw_chart(page, MARGIN + half + GAP, y, half, "Captions finding their image, among the evaluation images",
               curves or {"R@1": []}, steps)  # fmt: skip
    return steps


def draw_curves(out_png: str | Path, log_history: list[dict], batch: int | None, title: str) -> None:
    """Draw how a run went: loss and recall as in `draw_report`, and the learning rate and the logit scale below.

    Of pairs that are contrasted `batch` at a time, the loss of guessing, ln(batch), is drawn too.
    """
    page = Page(2 * MARGIN + 38 + 2 * CHART + GAP)
    y = MARGIN - 8
    page.text(MARGIN, y, page.wrap(title, 22, WIDTH - 2 * MARGIN, 1)[0], 22)
    y += 46
    chance = (f"guessing, ln({batch}) = {math.log(batch):.3g}", math.log(batch)) if batch else None
    steps = draw_loss_and_recall(page, y, log_history, chance)
    y += CHART + GAP
    half = (WIDTH - 2 * MARGIN - GAP) / 2
    rate, scale = curve(log_history, "learning_rate"), curve(log_history, "logit_scale")
    near = max((value for _, value in scale), default=0) > 50
    draw_chart(page, MARGIN, y, half, "Learning rate", {"rate": rate}, steps)
    draw_chart(page, MARGIN + half + GAP, y, half, "Logit scale (1 / temperature)", {"scale": scale}, steps,
               reference=("limit, 100", 100) if near else None)  # fmt: skip
    page.save(out_png)


def draw_report(out_png: str | Path, log_history: list[dict], examples: list[dict], title: str) -> None:
    """Draw the picture of a run into a file.

    `log_history` is that of the Trainer's `trainer_state.json`; `loss` and `eval_text_to_image_R@K` (as fractions
    of 1) are drawn where they are logged. An example is {"caption": str, "retrieved": [(path, score), ...] best
    first, "correct": path, "rank": place of the right image, from 1}. Either list may be empty.
    """
    row = IMAGE + 46
    page = Page(MARGIN + 44 + CHART + (58 + row * len(examples) if examples else MARGIN))
    y = MARGIN - 8
    page.text(MARGIN, y, page.wrap(title, 22, WIDTH - 2 * MARGIN, 1)[0], 22)
    y += 46

    draw_loss_and_recall(page, y, log_history)
    y += CHART + 28

    if examples:
        page.text(MARGIN, y, "Caption", 12, GREY)
        page.text(MARGIN + CAPTION, y, "Images found, best first: rank and score", 12, GREY)
        if any(str(e["correct"]) not in [str(path) for path, _ in e["retrieved"][:SHOWN]] for e in examples):
            page.text(WIDTH - MARGIN - IMAGE, y, "The right one", 12, GREY)
        y += 26
    for example in examples:
        draw_example(page, MARGIN, y, example)
        y += row
    page.save(out_png)
