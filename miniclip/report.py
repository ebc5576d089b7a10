"""What did training look like?

One picture says it: the loss and Recall@K over training, and for a few captions the images that the model finds for
them, the right one marked. Drawn with Pillow alone, since it is here anyway.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

INK, GREY, GRID, PAPER, CELL = "#1f2328", "#6b7280", "#e3e6ea", "#ffffff", "#f1f3f5"
GREEN = "#1a9850"  # the right image; it carries a tick mark too, for those who do not tell green from red
LINES = ["#1d4ed8", "#ea7a0c", "#8b3fc7", "#0f9f9a"]
WIDTH, MARGIN, CHART, IMAGE, GAP, CAPTION = 1160, 32, 270, 128, 12, 300  # in points, of which one is SHARPNESS pixels
SHARPNESS = 2


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
        (self.image.reduce(2) if self.freetype else self.image).save(path)

    def _px(self, points: list) -> list:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def _font(self, size: float):
        return ImageFont.load_default(size=size * self.scale) if self.freetype else ImageFont.load_default()

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


def curve(log_history: list[dict], key: str) -> list[tuple[float, float]]:
    """The (step, value) points logged under a key, in order of the step, without what is no finite number.

    Of several values of one step the first counts: the last evaluation may be that of an earlier, better checkpoint.
    """
    points: dict[float, float] = {}
    for entry in log_history:
        step, value = entry.get("step"), entry.get(key)
        if all(isinstance(number, (int, float)) and math.isfinite(number) for number in (step, value)):
            points.setdefault(step, value)
    return sorted(points.items())


def ticks(top: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from 0 to the first one that is not below `top`."""
    step = 10 ** math.floor(math.log10(top / about))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * about >= top * 0.999)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def smooth(points: list, reach: int) -> list:
    """The running mean over `reach` neighbours on each side."""
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(step, sum(value for _, value in window) / len(window)) for (step, _), window in zip(points, windows)]


def draw_chart(page: Page, x: float, y: float, w: float, title: str, curves: dict, last_step: float, unit: str) -> None:
    """Draw named curves with axes, ticks and a legend, which gives the last values."""
    left, top, right, bottom = x + 46, y + 54, x + w - 14, y + CHART - 44
    page.frame(x, y, w, CHART, GRID, 1)
    page.text(x + 16, y + 12, title, 14)
    x_ticks = ticks(last_step)
    highest = max((value for points in curves.values() for _, value in points), default=1)
    y_ticks = [0, 20, 40, 60, 80, 100] if unit else ticks(highest if highest > 0 else 1)
    to_page = lambda step, value: (left + (right - left) * step / max(last_step, x_ticks[1] if len(x_ticks) < 2 else last_step),  # noqa
                                   bottom - (bottom - top) * max(0, value) / y_ticks[-1])
