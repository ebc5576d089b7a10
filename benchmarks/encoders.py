"""Which encoders shall I take? Recall of the projections alone, against size, seconds, memory and licence.

    python benchmarks/encoders.py --data data/flickr8k

Trains the projections between each pair of encoders that is installed (requirements-encoders.txt) by train.py on
en_train.json, measures them once on en_val.json, and times the encoders on 200 of its images and 1,000 captions. Writes
its part of RESULTS.md and the picture docs/encoders.png; for some of the models alone a part of their own, and no
picture. Each model runs in processes of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from results import machine, section, write_section  # noqa: E402

APACHE = "Apache-2.0"
MODELS = {  # a model config, and the licences of its weights
    "EfficientNet-Lite0-MiniLM": APACHE,
    "EfficientNet-Lite0-Lite2-MiniLM": APACHE,
    "EfficientNet-Lite0-Lite2-MPNet": APACHE,
    "EfficientNet-Lite0-Lite2-MiniLM-MPNet": APACHE,
    "EfficientNet-Lite0-E5": f"{APACHE}; MIT",
}
COLUMNS = [
    "model", "text to image R@1 / 5 / 10", "image to text R@1 / 5 / 10", "weights, MB", "s per 1,000 pictures",
    "s per 1,000 captions", "memory, GB", "licences",
]  # fmt: skip


def cost(name: str, data: Path) -> dict:
    """What the encoders of a model cost in this process."""
    from miniclip.datasets.read import read_captions
    from miniclip.datasets.records import flatten_captions
    from miniclip.inference.embed import embed_images, embed_texts
    from miniclip.inference.load import load

    model, preprocess, tokenizer = load(name)
    records = read_captions(data / "en_val.json", check_images=False)
    images, texts = [record["image"] for record in records[:200]], flatten_captions(records)[0][:1000]
    found = {"megabytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6}
    for kind, embed, items in (
        ("pictures", lambda items: embed_images(model, preprocess, items), images),
        ("captions", lambda items: embed_texts(model, tokenizer, items), texts),
    ):
        embed(items[:64])
        start = time.perf_counter()
        embed(items)
        found[kind] = (time.perf_counter() - start) * 1000 / len(items)
    return found | {"gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def recall(name: str, data: Path, cache: str) -> dict:
    """The metrics of a model whose projections train.py has trained, with its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--model", name, "--train_file", data / "en_train.json", "--eval_file", data / "en_val.json"]
        argv += ["--output_dir", folder, "--feature_cache", cache, "--eval_strategy", "no", "--save_strategy", "no"]
        subprocess.run([sys.executable, ROOT / "train.py", *argv], check=True, stdout=sys.stderr)
        return last_metrics(Path(folder))


def last_metrics(folder: Path) -> dict:
    """What the run in a folder measured at its end."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    measured = [line for line in lines if "eval_mean_recall" in line][-1]
    return {name.removeprefix("eval_"): value for name, value in measured.items() if name.startswith("eval_")}


def draw(found: dict[str, dict], path: Path):
    """Recall against time, as large as the weights: above the line is nothing."""
    from miniclip.reports.style import BLUE, GREY, new_figure, save_png, styled

    with styled():
        figure = new_figure(7, 4)
        axes = figure.subplots()
        points = {
            name: (row["pictures"] + 5 * row["captions"], 100 * row["mean_recall"]) for name, row in found.items()
        }
        front, best = [], -1.0
        for place, (name, (x, y)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
            size = found[name]["megabytes"]
            axes.scatter(x, y, s=size, color=BLUE, alpha=0.7)
            text = f"{name.removeprefix('EfficientNet-')}, {size:.0f} MB"
            beside = (size**0.5 / 2 + 8) * (1 if place % 2 else -1)  # points above or below: the radius and a gap
            axes.annotate(text, (x, y), (0, beside), textcoords="offset points", color=GREY, va="center")
            if y > best:
                front, best = [*front, (x, y)], y
        axes.plot(*zip(*front), color=GREY, linewidth=1, zorder=0)
        axes.set_xlim(0, 1.6 * max(x for x, _ in points.values()))
        axes.margins(y=0.2)
        axes.set_xlabel("seconds per 1,000 pictures with five captions each")
        axes.set_ylabel("mean recall")
        save_png(path, figure)


def write(found: dict[str, dict], name: str):
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for model, row in found.items():
        ways = (
            " / ".join(f"{100 * row[f'{way}_R@{k}']:.1f}" for k in (1, 5, 10))
            for way in ("text_to_image", "image_to_text")
        )
        costs = f"{row['megabytes']:.0f} | {row['pictures']:.0f} | {row['captions']:.1f} | {row['gigabytes']:.1f}"
        rows.append(f"| {' | '.join([model, *ways, costs, MODELS[model]])} |")
    about = f"{machine()}. `python benchmarks/encoders.py`: projections trained with train.py's defaults, seed 42."
    write_section(name, "\n".join([f"## E{name.removeprefix('e')}", "", about, "", *rows]))
    if name == "encoders":
        draw(found, ROOT / "docs" / "encoders.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "flickr8k")
    parser.add_argument("--cache", default="runs/features")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cost", help=argparse.SUPPRESS)  # of one model, in this process
    options = parser.parse_args()
    if options.cost:
        return print(json.dumps(cost(options.cost, options.data)))
    found = {}
    for name in options.models:
        command = [sys.executable, __file__, "--cost", name, "--data", options.data]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} is left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1]) | recall(name, options.data, options.cache)
        print(name, found[name], flush=True)
    options.models = list(found)
    if found:
        write(found, section("encoders", parser, options, "models"))


if __name__ == "__main__":
    main()
