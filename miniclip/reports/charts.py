"""Charts: training curves, the PNG report of an evaluation, the curves of the HTML report, a WiSE-FT sweep."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from miniclip.reports import style
from miniclip.reports.style import fit, new_figure, save_png, styled, to_svg
from miniclip.utils.image_files import open_image

SHOWN = 5  # images per caption
Points = list[tuple[float, float]]


def is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def curve(log_history: list[dict], key: str) -> Points:
    """The finite (step, value) points logged under a key, by step. The first value of a step counts: an evaluation
    after training may be of an earlier, better model."""
    points = [(entry.get("step"), entry.get(key)) for entry in reversed(log_history)]
    return sorted({step: value for step, value in points if is_finite(step) and is_finite(value)}.items())


def percent_axis(axis):
    axis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def plot_curves(axes, title: str, curves: dict[str, Points], share=False, steps=None, reference=None, note=""):
    """Plots curves over training, up to `steps`: {name: points}. `share`: the values are fractions of 1, shown in
    percent. `reference` (name, value) is drawn as a dashed line for comparison."""
    for name, points in filter(lambda item: item[1], curves.items()):
        x, y = np.array(points).T
        many = {"marker": ""} if len(points) > 40 else {}
        (line,) = axes.plot(x, y, **many, linewidth=0.5 if many and name == "loss" else None)
        if many and name == "loss":  # it is noisy: the running mean on top
            window = np.ones(2 * (len(points) // 40) + 1)
            mean = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
            (line,) = axes.plot(x, mean, color=line.get_color(), linestyle="-", marker="")
        line.set_label(f"{name}  {y[-1]:.1%}" if share else f"{name}  {y[-1]:.3g}")
    if not any(curves.values()):
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, color=style.GREY, ha="center")
    if reference:
        axes.axhline(reference[1], color=style.GREY, linestyle="--", linewidth=1, label=reference[0])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    axes.set_title(title, pad=24)
    axes.set_title(note, loc="right", color=style.RED, fontsize=9, pad=24)
    drawn = [point for points in curves.values() for point in points]
    values = [0, *(value for _, value in drawn), *([reference[1]] if reference else [])]
    last = max(1, steps or max([step for step, _ in drawn], default=1))
    axes.set(xlabel="training step", xlim=(0, 1.02 * last), ylim=(min(values), 1.06 * max(values) or 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if share:
        percent_axis(axes.yaxis)


def plot_loss_and_recall(loss_axes, recall_axes, log_history: list[dict], reference=None) -> float:
    """Plots the loss, and the text to image recall and the zero-shot accuracy of a log. Returns the last step."""
    names = " ".join(name for entry in log_history for name in entry)
    ks = sorted({int(k) for k in re.findall(r"eval_text_to_image_R@(\d+)\b", names)})
    loss, recall = curve(log_history, "loss"), {f"R@{k}": curve(log_history, f"eval_text_to_image_R@{k}") for k in ks}
    zero_shot = curve(log_history, "eval_zero_shot_top1")
    steps = max([step for points in [loss, zero_shot, *recall.values()] for step, _ in points if step > 0], default=1)
    broken = sum("loss" in entry and not is_finite(entry["loss"]) for entry in log_history)
    note = f"not finite, skipped: {broken}" if broken else ""
    plot_curves(loss_axes, "Training loss", {"loss": loss}, False, steps, reference, note)
    title = "Text to image recall" + (", zero-shot accuracy" if zero_shot else " on the evaluation set")
    plot_curves(recall_axes, title, recall | {"zero-shot": zero_shot}, True, steps)
    recall_axes.set_ylim(0, 1.03)
    return steps


@styled()
def draw_curves(path: str | Path, log_history: list[dict], batch: int | None, title: str):
    """Draws loss, recall, learning rate and logit scale; for a `batch` of contrasted pairs the loss by chance too."""
    figure = new_figure(style.WIDTH, 7)
    fit(figure.suptitle("", x=0.01, ha="left"), title, style.WIDTH - 0.5)
    (loss, recall), (rate, scale) = figure.subplots(2, 2)
    chance = (f"chance, ln({batch}) = {math.log(batch):.3g}", math.log(batch)) if batch else None
    steps = plot_loss_and_recall(loss, recall, log_history, chance)
    scales = curve(log_history, "logit_scale")
    limit = ("limit, 100", 100) if max((value for _, value in scales), default=0) > 50 else None
    plot_curves(rate, "Learning rate", {"rate": curve(log_history, "learning_rate")}, False, steps)
    plot_curves(scale, "Logit scale (1 / temperature)", {"scale": scales}, False, steps, limit)
    return save_png(path, figure)


def pick_examples(images: Sequence, captions: Sequence[str], result, image_of_text) -> list[dict]:
    """Four captions, from all over the set and one that ranks its image low, and the images that they retrieve."""
    rows = [int(len(captions) * share) for share in (0.1, 0.37, 0.64)]
    rows.append(int(np.argmax(result.ranks * (result.ranks <= SHOWN))))  # the lowest rank that is still shown
    examples = []
    for row in rows:
        retrieved = [(images[i], float(score)) for i, score in zip(result.found[row, :SHOWN], result.scores[row])]
        about = {"caption": captions[row], "correct": images[image_of_text[row]], "rank": int(result.ranks[row])}
        examples.append({**about, "retrieved": retrieved})
    return examples


@styled()
def draw_report(path: str | Path, log_history: list[dict], examples: list[dict], title: str):
    """Draws the training curves, from the Trainer's log, and text to image searches: {"caption": str, "retrieved":
    [(path, score), ...] best first, "correct": path, "rank": rank of the correct image}. Both lists may be empty."""
    top, row = 4.0, 1.66
    height = top + row * len(examples) + 0.25 * bool(examples)
    figure = new_figure(style.WIDTH, height, layout=None)
    fit(figure.text(0.027, 1 - 0.3 / height, "", va="center", fontsize=15), title, style.WIDTH - 0.7)
    grid = {"left": 0.06, "right": 0.985, "top": 1 - 1.1 / height, "bottom": 1 - (top - 0.75) / height}
    plot_loss_and_recall(*figure.subplots(1, 2, gridspec_kw={**grid, "wspace": 0.14}), log_history)
    for n, example in enumerate(examples):
        draw_example(figure, example, 1 - (top + 0.12 + n * row) / height, 1.24 / height)
    for x, text in [(0.027, "Caption"), (0.26, "Images retrieved, best first: rank and cosine")] if examples else []:
        figure.text(x, 1 - top / height, text, color=style.GREY, va="bottom", fontsize=9)
    return save_png(path, figure)


def draw_example(figure, example: dict, top: float, height: float):
    """Draws a caption, the images it retrieves and the correct image if it is not among them, from `top` down."""
    rank, color = f"{example['rank']:,}", style.GREEN if example["rank"] == 1 else style.GREY
    verdict = "correct image first" if rank == "1" else f"correct image at rank {rank}"
    label = figure.text(0.027, top - height / 2 + 0.1 * height, "", va="center", fontsize=11)
    fit(label, example["caption"], 2.55, 4)
    below = label.get_window_extent().y0 / figure.bbox.height - 0.06 * height
    figure.text(0.027, below, verdict, color=color, va="top", fontsize=9)
    found, correct = enumerate(example["retrieved"][:SHOWN]), str(example["correct"])
    cells = [(0.26 + 0.117 * place, path, f"{place + 1}   {score:.3f}") for place, (path, score) in found]
    if correct not in [str(path) for _, path, _ in cells]:
        cells.append((0.872, example["correct"], rank))
    for left, path, text in cells:
        draw_image(figure.add_axes((left, top - height, 1.24 / style.WIDTH, height)), path, text, str(path) == correct)


def draw_image(axes, path, label: str, correct: bool):
    """Draws a whole image into a square. The correct one has a green frame and, for the colour-blind, a tick mark."""
    try:
        image = open_image(path, 320)
        image.thumbnail((320, 320))
        width, height = (length / max(image.size) / 2 for length in image.size)
        axes.imshow(image, extent=(0.5 - width, 0.5 + width, 0.5 - height, 0.5 + height))
    except (ValueError, OSError):
        axes.text(0.5, 0.5, "no image", color=style.GREY, ha="center", va="center", fontsize=9)
    axes.grid(False)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[], yticks=[], facecolor=style.CELL)
    axes.spines[:].set(visible=correct, color=style.GREEN, linewidth=3)
    axes.set_xlabel(f"✓ {label}" if correct else label, labelpad=5)
    axes.xaxis.label.set(color=style.GREEN if correct else style.INK, weight="bold" if correct else "normal")


@styled()
def recall_svg(curves: dict[str, np.ndarray], chance: list[np.ndarray], description: str) -> str:
    """R@K over K as SVG: {name: (K,) recalls from K = 1}, and likewise by chance."""
    axes = new_figure(*style.SVG_SIZE).subplots()
    for name, values in curves.items():
        marked = [k for k in (1, 5, 10) if k <= len(values)]
        ks = np.unique([*np.geomspace(1, len(values), 150).round().astype(int), *marked])
        axes.plot(ks, values[ks - 1], label=name, markevery=np.searchsorted(ks, marked).tolist())
    for n, values in enumerate(chance):
        ks = range(1, len(values) + 1)
        axes.plot(ks, values, ":", color=style.GREY, marker="", zorder=1, label=None if n else "by chance")
    axes.set(xscale="log", ylim=(0, 1.03), xlabel="K: number of results")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    percent_axis(axes.yaxis)
    axes.figure.legend(loc="outside upper left", ncols=3)
    return to_svg(axes.figure, "R@K for every K, in percent", description)


@styled()
def histogram_svg(edges: np.ndarray, shares: dict[str, np.ndarray], means: Sequence[float], description: str) -> str:
    """Two histograms, as SVG: the share of pairs in each bar between `edges`, {name: shares}, and their means."""
    axes = new_figure(*style.SVG_SIZE).subplots()
    looks = zip(shares.items(), means, (style.BLUE, style.ORANGE), ("-", "--"), (None, "////"))
    for (name, heights), mean, color, dashes, hatch in reversed(list(looks)):
        if not heights.any():
            continue
        first, last = np.flatnonzero(heights)[[0, -1]]
        bars = heights[first : last + 1], edges[first : last + 2]
        fill = {"facecolor": "none", "hatch": hatch} if hatch else {"facecolor": color, "alpha": 0.3}
        axes.stairs(*bars, fill=True, edgecolor=color, linewidth=0, **fill)
        axes.stairs(*bars, color=color, linestyle=dashes, label=name)
        axes.axvline(mean, color=color, linestyle=dashes, linewidth=1.2)
    axes.set(xlabel=f"cosine, in bars of {edges[1] - edges[0]:.3g}", ylim=(0, None))
    percent_axis(axes.yaxis)
    axes.figure.legend(loc="outside upper left", ncols=2, reverse=True)
    return to_svg(axes.figure, "Cosines of matching pairs and of others", description)


@styled()
def training_svg(title: str, curves: dict[str, Points], share: bool) -> str:
    """Curves over training, {name: points}, as SVG."""
    figure = new_figure(*style.SVG_SIZE)
    plot_curves(figure.subplots(), "", curves, share)
    ends = ", ".join(f"{name} {points[-1][1]:.3g} at the end" for name, points in curves.items())
    return to_svg(figure, title, f"Up to step {max(points[-1][0] for points in curves.values()):,}: {ends}.")


@styled()
def draw_sweep(path: str | Path, found: list[dict], best: float, title: str):
    """Draws a sweep of `wise_ft.sweep`: recall on the task "new" over "old", and both over alpha; `best` is marked."""
    figure = new_figure(style.WIDTH, 4.8)
    fit(figure.suptitle("", x=0.01, ha="left"), title, style.WIDTH - 0.5)
    both, over = figure.subplots(1, 2)
    alphas = [entry["alpha"] for entry in found]
    new, old = ([entry[task]["mean_recall"] for entry in found] for task in ("new", "old"))
    both.plot(old, new)
    both.plot(old[alphas.index(best)], new[alphas.index(best)], "o", color=style.GREEN, markersize=9)
    for alpha, *point in zip(alphas, old, new):
        text = f"{alpha:g}" + ", best mean" * (alpha == best)
        both.annotate(text, point, (6, 4), textcoords="offset points", color=style.GREY, fontsize=9)
    both.set(title="What is gained, and what is kept", xlabel="mean recall, old task", ylabel="mean recall, new task")
    both.margins(0.08)
    over.plot(alphas, new, label="new task")
    over.plot(alphas, old, label="old task")
    over.set(title="Over alpha: 0 is before, 1 after fine-tuning", xlabel="alpha", ylabel="mean recall")
    over.legend()
    for axis in (both.xaxis, both.yaxis, over.yaxis):
        percent_axis(axis)
    return save_png(path, figure)
