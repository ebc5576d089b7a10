"""How often is a class recognised, and what is it mistaken for?

As numbers, as a table and as a picture, whatever it was that told the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from miniclip.reports.charts import GREEN, GREY, GRID, INK, MARGIN, PAPER, RED, WIDTH, Page


def classification_metrics(found: np.ndarray, truth: np.ndarray, num_classes: int) -> tuple[dict, np.ndarray]:
    """Metrics as fractions of 1, and the confusion matrix (C, C): truth by prediction, in pictures.

    `found` (N, k) has the rows of the classes, best first, `truth` (N,) that of the right one. `top1`, `top5` (of more
    than five classes): share of pictures whose class is among the first. `mean_per_class_recall`: the mean over the
    classes that have pictures, each counting alike however many it has.
    """
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (truth, found[:, 0]), 1)
    there = confusion.sum(axis=1) > 0
    recall = confusion.diagonal()[there] / confusion.sum(axis=1)[there]
    metrics = {"top1": float((found[:, 0] == truth).mean()), "mean_per_class_recall": float(recall.mean())}
    if num_classes > 5:
        metrics["top5"] = float((found[:, :5] == truth[:, None]).any(axis=1).mean())
    return metrics, confusion


def format_classes(names: Sequence[str], confusion: np.ndarray) -> str:
    """The classes as a Markdown table: pictures, recall, and for what else they were taken most often."""
    rows = ["| class | pictures | recall | most often taken for |", "|---|---|---|---|"]
    for row, name in enumerate(names):
        wrong = np.where(np.arange(len(names)) == row, 0, confusion[row])
        other = f"{names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        pictures = confusion[row].sum()
        recall = f"{100 * confusion[row, row] / pictures:.1f}" if pictures else ""
        rows.append(f"| {name} | {pictures} | {recall} | {other} |")
    return "\n".join(rows)


def format_metrics(metrics: dict[str, float], num_classes: int) -> str:
    """The metrics in one line, in percent."""
    shares = [f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in metrics.items()]
    return f"{', '.join(shares)} (chance {100 / num_classes:.1f})"


def draw_confusion(path: str | Path, confusion: np.ndarray, names: Sequence[str], title: str):
    """Draws a confusion matrix (C, C) into a .png: a row for each class, and what its pictures were taken for. Of more
    than 40 classes the 40 that are mistaken most often."""
    kept = sorted((confusion.sum(axis=1) - confusion.diagonal()).argsort(kind="stable")[::-1][:40])
    label, top, end = 230, MARGIN + 76, WIDTH - MARGIN - 96
    cell = min(64, (end - MARGIN - label) / len(kept))
    page = Page(top + cell * len(kept) + 46)
    page.text(MARGIN, MARGIN - 8, page.wrap(title, 22, WIDTH - 2 * MARGIN, 1)[0], 22)
    more = f"; the {len(kept)} of {len(names)} classes that are mistaken most often" if len(kept) < len(names) else ""
    page.text(MARGIN, MARGIN + 24, f"Rows: the truth. Columns: what it was taken for{more}.", 12, GREY)
    left, size = MARGIN + label, min(13, max(6, cell * 0.34))
    for place, row in enumerate(kept):
        pictures, y = confusion[row].sum(), top + place * cell
        middle = y + cell / 2 - 0.6 * size
        page.text(left + (place + 0.5) * cell, top - 1.6 * size, f"{row + 1}", size, GREY, align=0.5)
        page.text(left - 10, middle, page.wrap(f"{names[row]}  {row + 1}", size, label - 14, 1)[0], size, INK, align=1)
        for across, column in enumerate(kept):
            share, x = confusion[row, column] / max(1, pictures), left + across * cell
            fill = _blend(PAPER, GREEN if row == column else RED, 0.15 + 0.75 * share) if share else None
            page.frame(x + 1, y + 1, cell - 2, cell - 2, GRID, 1, fill)
            if share:
                number, colour = f"{confusion[row, column]:,}", PAPER if share > 0.55 else INK
                page.text(x + cell / 2, middle, number, min(size, 0.8 * size * cell / page.text_width(number, size)),
                          colour, align=0.5)  # fmt: skip
        recall = f"{confusion[row, row] / pictures:.0%} of {pictures:,}" if pictures else "no pictures"
        page.text(left + len(kept) * cell + 12, middle, recall, size, INK if pictures else GREY)
    page.text(left, top + cell * len(kept) + 8, "right in green, mistaken in red, by the share of the row", 11, GREY)
    page.save(path)


def _blend(one: str, other: str, share: float) -> str:
    """A colour between two, #rrggbb."""
    channels = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (one, other)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*channels))
