"""How much of the old model should the new one keep?

Between the weights before fine-tuning and those after it lies a line, and the models on it are often better than both
ends: most of what was learned, and most of what was known (WiSE-FT: Wortsman et al., arXiv 2109.01903):

    weights = (1 - alpha) before + alpha after

Here alpha is swept, each model measured on the new task and on the old one, and the sweep written as a table, as JSON
and as a picture. It costs no training:

    python -m miniclip wise_ft --before FOLDER --after FOLDER --new_file new.json --old_file old.json --output_dir DIR
"""

import copy
import math
from pathlib import Path

import torch
from tqdm.auto import tqdm

from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.evaluator import Tasks
from miniclip.inference.fast import inference_copy
from miniclip.model import MiniClip
from miniclip.reports.charts import CHART, GREEN, GREY, GRID, INK, LINES, MARGIN, WIDTH, Page, ticks
from miniclip.weights.interpolate import check_same, interpolate

ALPHAS = [number / 10 for number in range(11)]


def sweep(
    before: MiniClip,
    after: MiniClip,
    preprocess,
    tokenizer,
    records: dict[str, list[dict]],
    alphas: list[float] = ALPHAS,
    precision: str = "fp32",
    batch_size: int = 64,
    num_workers: int | None = None,
    progress: bool = False,
) -> list[dict]:
    """Measures the models between two on caption sets ("new" and "old", say): for each alpha
    `{"alpha": alpha, "mean": mean of the mean recalls, name: metrics, ...}`. A tower that is the same in both, as one
    that was locked, encodes once for all. Raises InputError for models that are not the same but for their numbers.
    """
    check_same(before.config, after.config)
    weights = before.state_dict(), after.state_dict()
    model, tasks, embeds, found = copy.deepcopy(after), Tasks(records), {}, []
    learned = {name.partition(".")[0] for name in weights[0] if not torch.equal(*(w[name] for w in weights))}
    for alpha in tqdm(alphas, "alphas", disable=not progress):
        model.load_state_dict(interpolate(*weights, alpha))
        fast = inference_copy(model, precision)
        if "visual" in learned or "image" not in embeds:
            embeds["image"] = embed_images(fast, preprocess, tasks.images, batch_size, num_workers)
        if "text" in learned or "text" not in embeds:
            embeds["text"] = embed_texts(fast, tokenizer, tasks.texts, batch_size)
        metrics = tasks.measure(embeds["image"], embeds["text"])
        mean = sum(task["mean_recall"] for task in metrics.values()) / len(metrics)
        found.append({"alpha": alpha, "mean": mean, **metrics})
    return found


def best(found: list[dict]) -> float:
    """The alpha with the highest mean of both recalls; of equal ones that which keeps more of the old model."""
    return max(found, key=lambda entry: (entry["mean"], -entry["alpha"]))["alpha"]


COLUMNS = ["mean_recall", "text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@1", "image_to_text_R@10"]


def format_sweep(found: list[dict]) -> str:
    """The sweep as a Markdown table, in percent: the new task beside the old one."""
    heads = [f"{task}: {metric.replace('_', ' ')}" for task in ("new", "old") for metric in COLUMNS]
    heads = ["alpha", *heads, "mean of both"]
    rows = [heads, ["---"] * len(heads)]
    for entry in found:
        shares = [entry[task][metric] for task in ("new", "old") for metric in COLUMNS]
        rows.append([f"{entry['alpha']:g}", *(f"{100 * share:.1f}" for share in (*shares, entry["mean"]))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_sweep(path: str | Path, found: list[dict], title: str):
    """Draws a sweep into a .png: the recall of the new task over that of the old one, each alpha a dot, and both over
    alpha. `found` is what `sweep` gives, for the tasks "new" and "old"."""
    page = Page(MARGIN + 44 + CHART + 100 + MARGIN)
    page.text(MARGIN, MARGIN - 8, page.wrap(title, 22, WIDTH - 2 * MARGIN, 1)[0], 22)
    width, top = (WIDTH - 3 * MARGIN) / 2, MARGIN + 44
    new, old = ([entry[task]["mean_recall"] for entry in found] for task in ("new", "old"))
    names = ("mean recall, old task", "mean recall, new task")
    place = draw_axes(page, MARGIN, top, width, CHART + 100, "What is gained, and what is kept", *names, old, new)
    page.line([place(*point) for point in zip(old, new)], LINES[0], 2)
    for entry, *point in zip(found, old, new):
        x, y = place(*point)
        page.dot(x, y, 4, GREEN if entry["alpha"] == best(found) else LINES[0])
        page.text(x + 7, y - 7, f"{entry['alpha']:g}", 11, GREY)
    alphas = [entry["alpha"] for entry in found]
    left = 2 * MARGIN + width
    place = draw_axes(
        page, left, top, width, CHART + 100, "Over alpha: 0 is before, 1 after fine-tuning", "alpha", "mean recall",
        [0, 1], [*new, *old], percent=False,
    )  # fmt: skip
    legend = left + width - 190
    for name, color, recalls in (("new task", LINES[0], new), ("old task", LINES[1], old)):
        line = [place(*point) for point in zip(alphas, recalls)]
        page.line(line, color, 2)
        for point in line:
            page.dot(*point, 2.5, color)
        page.line([(legend, top + 21), (legend + 14, top + 21)], color, 3)
        legend = page.text(legend + 20, top + 14, name, 12) + 22
    page.save(path)


def draw_axes(
    page: Page, x: float, y: float, w: float, h: float, title: str, x_name: str, y_name: str, xs: list, ys: list,
    percent: bool = True,
):  # fmt: skip
    """Draws a frame with axes for points (xs, ys), shares of 1, and gives the function from such a point to its place
    on the page. Without `percent` the numbers along the x axis are plain ones."""
    left, top, right, bottom = x + 62, y + 66, x + w - 24, y + h - 48
    page.frame(x, y, w, h, GRID, 1)
    page.text(x + 16, y + 12, title, 15)
    x_ticks, y_ticks = axis(xs), axis(ys)

    def place(across: float, up: float) -> tuple[float, float]:
        along = [(value - t[0]) / (t[-1] - t[0]) for value, t in ((across, x_ticks), (up, y_ticks))]
        return left + (right - left) * along[0], bottom - (bottom - top) * along[1]

    for value in y_ticks:
        level = place(x_ticks[0], value)[1]
        page.line([(left, level), (right, level)], GREY if value == y_ticks[0] else GRID)
        page.text(left - 8, level - 7, f"{100 * value:.3g}%", 11, GREY, align=1)
    for value in x_ticks:
        across = place(value, y_ticks[0])[0]
        page.line([(across, bottom), (across, bottom + 4)], GREY)
        page.text(across, bottom + 7, f"{100 * value:.3g}%" if percent else f"{value:g}", 11, GREY, align=0.5)
    page.text((left + right) / 2, bottom + 25, x_name, 11, INK, align=0.5)
    page.text(left - 8, top - 22, y_name, 11, INK)
    return place


def axis(values: list[float]) -> list[float]:
    """Round numbers that span the values, from 0 unless they all lie in the upper half."""
    low, high = min(values), max(max(values), min(values) + 1e-6)
    if low < 0.5 * high:
        return [round(tick, 9) for tick in ticks(high)]
    gap = ticks(high - low)[1]
    first = math.floor(low / gap + 1e-9)
    return [round(gap * number, 9) for number in range(first, math.ceil(high / gap - 1e-9) + 1)]
