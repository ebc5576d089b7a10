"""How much of the old model should the new one keep?

Between the weights before fine-tuning and those after it lies a line, and the models on it are often better than both
ends: most of what was learned, and most of what was known (WiSE-FT: Wortsman et al., arXiv 2109.01903):

    weights = (1 - alpha) before + alpha after

Here alpha is swept, each model measured on the new task and on the old one, and the sweep written as a table, as JSON
and as a picture. It costs no training:

    python -m miniclip.wise_ft --before FOLDER --after FOLDER --new_file new.json --old_file old.json --output_dir DIR
"""

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from miniclip.bad_samples import NAME, BadSamples
from miniclip.captions import one_per_image
from miniclip.config import InputError, MiniClipConfig
from miniclip.data import flatten_captions
from miniclip.fast import PRECISIONS, fast_model
from miniclip.files import write_json, write_text
from miniclip.inference import embed_images, embed_texts, load
from miniclip.model import MiniClip
from miniclip.options import find_device, run
from miniclip.report import CHART, GREEN, GREY, GRID, INK, LINES, MARGIN, WIDTH, Page, ticks
from miniclip.retrieval import retrieval_metrics
from miniclip.sources import read_source

ALPHAS = [number / 10 for number in range(11)]


def interpolate(before: dict[str, Tensor], after: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) before + alpha after, for two state dicts of the same names, shapes and types. Bit-equal to one of
    them at alpha 0 and 1, and to both where they are equal. Raises InputError where they differ in more than numbers.
    """
    kinds = [{name: (tuple(t.shape), t.dtype) for name, t in weights.items()} for weights in (before, after)]
    if differing := [name for name in kinds[0] | kinds[1] if kinds[0].get(name) != kinds[1].get(name)]:
        name = differing[0]
        raise InputError(f"{name} is {kinds[0].get(name)} before and {kinds[1].get(name)} after: not the same model")
    return {
        name: torch.lerp(t, after[name], alpha) if t.is_floating_point() else after[name] for name, t in before.items()
    }  # the others count BatchNorm's batches


def check_same(before: MiniClipConfig, after: MiniClipConfig):
    """Raises InputError, naming the fields, for two models that do not compute alike. How many patches training hides
    makes no difference."""
    flat = [dict(_flatten(config.to_dict())) for config in (before, after)]
    harmless = ("patch_dropout", "hf_proj_dropout", "hf_model_name")  # for what the weights compute
    fields = [field for field in flat[0] | flat[1] if field.rpartition(".")[2] not in harmless]
    if differing := [field for field in fields if flat[0].get(field) != flat[1].get(field)]:
        both = [(field, flat[0].get(field), flat[1].get(field)) for field in differing]
        problems = ", ".join(f"{field} is {before} before and {after} after" for field, before, after in both)
        raise InputError(f"{problems}: only weights of the same model, before and after fine-tuning, can be mixed")


def _flatten(values: dict, prefix: str = ""):
    for name, value in values.items():
        yield from _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


class Tasks:
    """Caption sets, by name, that are measured with the same model. Pictures that they share are encoded once."""

    def __init__(self, records: dict[str, list[dict]]):
        self.images = list(dict.fromkeys(record["image"] for task in records.values() for record in task))
        self.texts, self.places = [], {}
        row = {path: i for i, path in enumerate(self.images)}
        for name, task in records.items():
            texts, image_of_text = flatten_captions(task)
            rows = np.array([row[record["image"]] for record in task])
            self.places[name] = rows, slice(len(self.texts), len(self.texts) + len(texts)), image_of_text
            self.texts += texts

    def measure(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> dict[str, dict[str, float]]:
        """The metrics of each task, from the embeddings of `images` (N, E) and of `texts` (M, E)."""
        return {
            name: retrieval_metrics(image_embeds[rows], text_embeds[texts], image_of_text)
            for name, (rows, texts, image_of_text) in self.places.items()
        }


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
        fast = fast_model(model, precision)
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


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip.wise_ft", description="Mixes the weights before and after fine-tuning; measures each mix."
    )
    parser.add_argument("--before", required=True, help="folder of the model before, or a config with --pretrained")
    parser.add_argument("--pretrained", help="weights of --before where that is the name of a config")
    parser.add_argument("--after", required=True, help="folder of the model after fine-tuning")
    parser.add_argument("--new_file", required=True, help="captions of the new task")
    parser.add_argument("--old_file", required=True, help="captions of the old task")
    parser.add_argument("--image_root", help="folder that image paths start from; the caption file's own unless given")
    parser.add_argument("--on_bad_sample", choices=["stop", "skip"], default="stop", help="stop, or go on without")
    parser.add_argument("--allow_outside_image_root", action="store_true", help="image paths may lead out of it")
    parser.add_argument("--output_dir", required=True, help="folder for wise_ft.json, wise_ft.md and wise_ft.png")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help="default: 0 0.1 ... 1")
    parser.add_argument("--save_alpha", help="write the model of this alpha, or of the best one, to output_dir/model")
    parser.add_argument("--precision", default="fp32", choices=[p for p in PRECISIONS if p != "int8"])
    parser.add_argument("--batch_size", type=int, default=64, help="images or captions encoded at once")
    parser.add_argument("--num_workers", type=int, help="threads that read images; as many as there are cores")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one unless given")
    options = parser.parse_args(argv)
    alphas, save = set(options.alphas), options.save_alpha
    if save not in (None, "best"):
        try:
            save = float(save)
        except ValueError:
            raise InputError(f"--save_alpha {save!r} is neither a number nor best") from None
        alphas.add(save)
    if outside := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise InputError(f"alpha {outside[0]} lies outside of 0 (the model before) to 1 (the model after)")

    device = find_device(options.device)
    if not Path(options.before).is_dir() and options.pretrained is None:
        raise InputError(f"--before {options.before} is no folder; the name of a config needs --pretrained too")
    if not Path(options.after).is_dir():
        raise InputError(f"--after {options.after} is no folder that MiniCLIP saved")
    before, *_ = load(options.before, options.pretrained, device)
    after, preprocess, tokenizer = load(options.after, None, device)
    files = {"new": options.new_file, "old": options.old_file}
    bad_samples = BadSamples()
    about = {"on_bad": options.on_bad_sample, "allow_outside": options.allow_outside_image_root}
    about |= {"check_images": options.on_bad_sample == "skip", "check_handles": True, "bad_samples": bad_samples}
    records = {
        name: one_per_image(read_source(path, options.image_root, **about), path) for name, path in files.items()
    }
    how = {"precision": options.precision, "batch_size": options.batch_size, "num_workers": options.num_workers}
    found = sweep(before, after, preprocess, tokenizer, records, sorted(alphas), progress=True, **how)

    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table, chosen = format_sweep(found), best(found)
    about = {"before": str(options.before), "after": str(options.after), **files, "best_alpha": chosen}
    write_json(folder / "wise_ft.json", {**about, "sweep": found})
    write_text(folder / "wise_ft.md", table + "\n")
    new, old = (Path(path).stem for path in files.values())
    draw_sweep(folder / "wise_ft.png", found, f"{options.before} to {options.after}: {new} (new) and {old} (old)")
    bad_samples.open(folder / NAME)
    if bad_samples:
        print(f"{len(bad_samples)} bad samples were left out: {bad_samples.path}")
    print(f"{table}\nbest mean of both: alpha {chosen:g}. Written: wise_ft.json, wise_ft.md, wise_ft.png in {folder}")
    if save is not None:
        alpha = chosen if save == "best" else save
        after.save_pretrained(folder / "model", interpolate(before.state_dict(), after.state_dict(), alpha))
        print(f"the model of alpha {alpha:g} is in {folder / 'model'}")


if __name__ == "__main__":
    run(main)
