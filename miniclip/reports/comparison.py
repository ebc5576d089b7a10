"""Recall of several models or data sets in one table, with 95% intervals from a bootstrap over the images.

A resample draws as many images as there are, with replacement, and counts each with all its captions; the gallery stays
as it is. Models on the same data set meet the same resamples, so that their differences are paired: an interval that
excludes 0 shows a difference that the choice of test images does not explain. The interval is from the 2.5th to the
97.5th percentile (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13)."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miniclip.retrieval import KS, RetrievalResult
from miniclip.utils.command_line import cell, printable
from miniclip.utils.files import write_text

WAYS = ("image_to_text", "text_to_image")
NAMES = [*(f"{way}_R@{k}" for way in WAYS for k in KS), "mean_recall"]
SAMPLES, SEED, LEVEL = 1000, 0, 0.95
NOTE = f"In brackets: {LEVEL:.0%} intervals, of {SAMPLES:,} bootstrap samples of the images. Differences are paired."


@dataclass(frozen=True)
class Row:
    """A line of the table: a model on a data set, or `minus` another model."""

    dataset: str
    model: str
    minus: str | None
    images: int
    captions: int
    metrics: dict[str, float]  # shares of 1, by NAMES
    intervals: dict[str, list[float]]  # [low, high]

    @property
    def name(self) -> str:
        return f"{self.model} - {self.minus}" if self.minus else self.model

    def cells(self) -> list[tuple[str, str]]:
        """The value and the interval of each metric, in percent; differences with their sign."""
        sign = "+" if self.minus else ""
        percent = {n: [round(100 * x, 1) + 0.0 for x in (self.metrics[n], *self.intervals[n])] for n in NAMES}
        return [(f"{x:{sign}.1f}", f"[{low:{sign}.1f}, {high:{sign}.1f}]") for x, low, high in percent.values()]


def count_hits(results: dict[str, RetrievalResult], image_of_text: np.ndarray) -> np.ndarray:
    """What a resample adds up, for each of N images: (N, 2 len(KS) + 1). Whether it finds one of its captions among the
    first K; how many of its captions find it; how many it has. `results` are those of `retrieval.search_both`."""
    image, text = (np.stack([results[way].hits[:, :k].any(1) for k in KS]).astype(float) for way in WAYS)
    n = image.shape[1]
    found = [np.bincount(image_of_text, hits, n) for hits in text]
    return np.stack([*image, *found, np.bincount(image_of_text, minlength=n)], axis=1)


def recalls(totals: np.ndarray, images: int) -> np.ndarray:
    """The metrics of NAMES, (..., 7), from sums (..., 2 len(KS) + 1) of `count_hits` over a number of images."""
    n = len(KS)
    shares = np.concatenate([totals[..., :n] / images, totals[..., n : 2 * n] / totals[..., 2 * n :]], axis=-1)
    return np.concatenate([shares, shares.mean(axis=-1, keepdims=True)], axis=-1)


def bootstrap(counts: Sequence[np.ndarray], samples: int = SAMPLES, seed: int = SEED) -> np.ndarray:
    """The metrics of each model in each resample, (models, samples, 7), from `count_hits` of the same images."""
    n, rng, joined = len(counts[0]), np.random.default_rng(seed), np.concatenate(counts, axis=1)
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(samples))  # how often each image is drawn
    totals = np.stack([times @ joined for times in draws])
    return np.stack([recalls(part, n) for part in np.split(totals, len(counts), axis=1)])


def compare(measured: Sequence[tuple[str, str, np.ndarray]], samples: int = SAMPLES, seed: int = SEED) -> list[Row]:
    """The rows of the table for models on data sets, each (dataset, model, `count_hits`). Models on the same data set
    must be given with the same images; their differences from the first one follow."""
    rows = []
    for dataset in dict.fromkeys(dataset for dataset, *_ in measured):
        models, counts = zip(*((model, counts) for name, model, counts in measured if name == dataset))
        images, captions = len(counts[0]), int(counts[0][:, -1].sum())
        values = np.stack([recalls(each.sum(0), images) for each in counts])
        resamples = bootstrap(counts, samples, seed)
        found = [(model, None, x, boot) for model, x, boot in zip(models, values, resamples)]
        pairs = zip(models[1:], values[1:] - values[0], resamples[1:] - resamples[0])
        for model, minus, value, boot in [*found, *((model, models[0], *rest) for model, *rest in pairs)]:
            ends = np.quantile(boot, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T.tolist()
            metrics = dict(zip(NAMES, value.tolist()))
            rows.append(Row(dataset, model, minus, images, captions, metrics, dict(zip(NAMES, ends))))
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """A table of plain text, with each interval below its value."""
    blank = [""] * (len(KS) - 1)
    lines = [["", "", "image to text", *blank, "text to image", *blank, "mean"]]
    lines += [["data", "model", *[f"R@{k}" for k in KS] * 2, "recall"]]
    for row in rows:
        values, intervals = zip(*row.cells())
        lines += [[printable(row.dataset), printable(row.name), *values], ["", "", *intervals]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = ([c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines)
    return "\n".join([*("  ".join(cells).rstrip() for cells in aligned), NOTE]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each row, with shares of 1: the metrics, each followed by the ends of its interval."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    ends = [f"{name}{end}" for name in NAMES for end in ("", "_low", "_high")]
    writer.writerow(["dataset", "model", "minus", "images", "captions", *ends])
    for row in rows:
        values = [x for name in NAMES for x in (row.metrics[name], *row.intervals[name])]
        writer.writerow([row.dataset, row.model, row.minus, row.images, row.captions, *(f"{x:.6f}" for x in values)])
    return file.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, each interval behind its value."""
    head = ["data", "model", *(f"{way.replace('_', ' ')} R@{k}" for way in WAYS for k in KS), "mean recall"]
    lines = [head, ["---"] * 2 + ["---:"] * len(NAMES)]
    for row in rows:
        names = map(cell, (row.dataset, row.name))
        lines.append([*names, *(f"{value} {interval}" for value, interval in row.cells())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{NOTE}\n"


def as_latex(rows: Sequence[Row]) -> str:
    """A tabular for the package booktabs."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}"}
    special = str.maketrans(special | {character: f"\\{character}" for character in "&%$#_{}"})
    head = "".join(rf" & \multicolumn{{{len(KS)}}}{{c}}{{{way.replace('_', ' ')}}}" for way in WAYS)
    lines = [
        f"% \\usepackage{{booktabs}}. {NOTE}", rf"\begin{{tabular}}{{ll{'r' * len(NAMES)}}}", r"\toprule",
        rf" &{head} & mean \\", rf"data & model & {' & '.join([f'R@{k}' for k in KS] * 2)} & recall \\", r"\midrule",
    ]  # fmt: skip
    for row in rows:
        data, *models = (printable(name).translate(special) for name in (row.dataset, row.model, row.minus or ""))
        cells = [rf"{value} {{\scriptsize {interval}}}".replace("-", "$-$") for value, interval in row.cells()]
        lines.append(" & ".join([data, " $-$ ".join(filter(None, models)), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


WRITERS = {".txt": as_text, ".csv": as_csv, ".md": as_markdown, ".tex": as_latex}


def write_table(path: str | Path, rows: Sequence[Row]):
    """Writes the table in the form that the ending of a file, one of WRITERS, says."""
    write_text(path, WRITERS[Path(path).suffix.lower()](rows))
