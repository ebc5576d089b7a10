"""Classification metrics and the confusion matrix: as numbers, as a table and as a chart."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from miniclip.reports.style import GREY, INK, PAPER, WIDTH, fit, new_figure, save_png, styled
from miniclip.utils.command_line import cell

MOST = 40  # classes drawn


def classification_metrics(found: np.ndarray, truth: np.ndarray, num_classes: int) -> tuple[dict, np.ndarray]:
    """Metrics as fractions of 1, and the confusion matrix (C, C): images by true class (rows) and prediction (columns).
    `found` (N, k) holds predicted class indices, best first; `truth` (N,) the true ones. `top1` and, of more than five
    classes, `top5`: share of images whose class is among the first. `mean_per_class_recall`: of classes with images."""
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (truth, found[:, 0]), 1)
    there = confusion.sum(axis=1) > 0
    recall = confusion.diagonal()[there] / confusion.sum(axis=1)[there]
    metrics = {"top1": float((found[:, 0] == truth).mean()), "mean_per_class_recall": float(recall.mean())}
    if num_classes > 5:
        metrics["top5"] = float((found[:, :5] == truth[:, None]).any(axis=1).mean())
    return metrics, confusion


def format_classes(names: Sequence[str], confusion: np.ndarray) -> str:
    """The classes as a Markdown table: number of images, recall, and the most frequent wrong prediction."""
    rows = ["| class | images | recall | most often mistaken for |", "|---|---|---|---|"]
    for row, name in enumerate(names):
        wrong, images = np.where(np.arange(len(names)) == row, 0, confusion[row]), confusion[row].sum()
        other = f"{cell(names[wrong.argmax()])} ({wrong.max()})" if wrong.any() else ""
        recall = f"{100 * confusion[row, row] / images:.1f}" if images else ""
        rows.append(f"| {cell(name)} | {images} | {recall} | {other} |")
    return "\n".join(rows)


def format_metrics(metrics: dict[str, float], num_classes: int) -> str:
    shares = [f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in metrics.items()]
    return f"{', '.join(shares)} (chance {100 / num_classes:.1f})"


@styled()
def draw_confusion(path: str | Path, confusion: np.ndarray, names: Sequence[str], title: str):
    """Draws a confusion matrix (C, C), coloured by the share of each row; of the 40 classes most often mistaken."""
    kept = sorted((confusion.sum(axis=1) - confusion.diagonal()).argsort(kind="stable")[::-1][:MOST])
    counts, images = confusion[np.ix_(kept, kept)], confusion.sum(axis=1)[kept]
    share, correct = counts / np.maximum(1, images)[:, None], np.eye(len(kept), dtype=bool)
    cell = min(0.64, (WIDTH - 4) / len(kept))  # inches, beside 2.6 for the names and 1.4 for the recalls
    side, size = cell * len(kept), min(10, max(5, 25 * cell))
    height = side + 1.8
    figure = new_figure(WIDTH, height, layout=None)
    fit(figure.text(0.027, 1 - 0.35 / height, "", va="center", fontsize=15), title, WIDTH - 0.7)
    more = f"; the {len(kept)} of {len(names)} classes most often mistaken" if len(kept) < len(names) else ""
    figure.text(0.027, 1 - 0.75 / height, f"Rows: true class. Columns: predicted class{more}.", color=GREY)
    axes = figure.add_axes((2.6 / WIDTH, 0.5 / height, side / WIDTH, side / height))
    for cells, colours in ((correct, "Greens"), (~correct, "Reds")):
        axes.imshow(np.where(cells & (share > 0), share, np.nan), cmap=colours, vmin=-0.1, vmax=1.3)
    axes.set_xticks(range(len(kept)), [str(row + 1) for row in kept], fontsize=size)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.arange(len(kept) + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="both")
    axes.grid(visible=False, which="major")
    axes.tick_params(which="both", length=0, labeltop=True, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)
    for y, row in enumerate(kept):
        fit(name := axes.text(-0.5 - 0.1 / cell, y, "", ha="right", va="center", size=size), names[row], 2)
        name.set_text(f"{name.get_text()}  {row + 1}")
        recall = f"{counts[y, y] / images[y]:.0%} of {images[y]:,}" if images[y] else "no images"
        axes.text(len(kept) - 0.5 + 0.1 / cell, y, recall, va="center", size=size, color=INK if images[y] else GREY)
    for y, x in zip(*np.nonzero(counts)):
        number, colour = f"{counts[y, x]:,}", PAPER if share[y, x] > 0.65 else INK
        axes.text(x, y, number, ha="center", va="center", size=min(size, 90 * cell / len(number)), color=colour)
    key = "green: correct, red: mistaken; the darker, the larger the share of the row"
    axes.text(-0.5, len(kept) - 0.5 + 0.1 / cell, key, va="top", color=GREY, fontsize=9)
    return save_png(path, figure)
