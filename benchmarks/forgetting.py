"""What does fine-tuning forget, and what does each remedy keep?

    python benchmarks/forgetting.py            # an hour on 2 cores; continues where it was interrupted
    python benchmarks/forgetting.py --quick    # minutes, on 200 images: a smoke test, with its table beside the runs

A small model learns Flickr8k's English captions from scratch (or is given, --base FOLDER), and is then fine-tuned on
the Chinese captions of the same images: plainly, and with each remedy of docs/finetuning.md. All are measured on the
1,000 validation images in both languages. Then the base hands slices of its weights down to a smaller model, which is
trained on beside one that starts from random weights. Writes docs/finetuning.md's tables, docs/forgetting.png and
docs/wise_ft.png. Results lie in --out, one folder a run; one whose result is there is not run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import machine, write_section  # noqa: E402

DOCS = ROOT / "docs"
LANGUAGES = {"old": "en", "new": "cn"}
RUNS = {  # name: (label in the table, options besides those of all runs)
    "plain": ("plain fine-tuning", []),
    "long": ("plain, twice as long", ["--num_train_epochs", "16"]),
    "low-rate": ("a fifth of the learning rate", ["--learning_rate", "1e-4"]),
    "layer-decay": ("layer-wise decay", ["--layer_decay", "0.7"]),
    "image-rate": ("image tower at a tenth of the rate", ["--tower_lr_scales", "0.1", "1"]),
    "text-rate": ("text tower at a tenth of the rate", ["--tower_lr_scales", "1", "0.1"]),
    "freeze-image": ("image tower frozen", ["--freeze_image", "all", "--hflip", "0"]),
    "freeze-text": ("text tower frozen except its projection", ["--freeze_text", "tower"]),
    "last-image": ("image tower: only the last block is trained", ["--freeze_image", "all_but_1"]),
    "last-both": (
        "both towers: only the last block is trained",
        ["--freeze_image", "all_but_1", "--freeze_text", "all_but_1"],
    ),
    "patch-dropout": ("half of the patches hidden", ["--patch_dropout", "0.5", "0.1"]),
    "ema": ("moving average of the weights", ["--ema", "0.999"]),
    "early-stop": (
        "twice as long, with early stopping", ["--num_train_epochs", "16", "--early_stopping_patience", "2"]
    ),
}  # fmt: skip
SWEPT = {"plain": "plain fine-tuning", "freeze-image": "image tower frozen"}  # interpolated with the base
FINE_TUNE = {
    "num_train_epochs": 8, "learning_rate": 5e-4, "weight_decay": 0.1, "warmup_steps": 0.1,
    "per_device_train_batch_size": 128, "crop_scale": 0.5, "hflip": 0.5, "save_strategy": "no",
}  # fmt: skip
SMALL = {  # what inherits from ViT-S-28-112: half of its width and of its depth
    "embed_dim": 256,
    "vision_cfg": {"image_size": 112, "layers": 3, "width": 128, "patch_size": 28},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}


class Study:
    """The folders of a study, and how its runs are made and measured."""

    def __init__(self, data: Path, out: Path, quick: bool):
        self.out, self.quick, self.data = out, quick, out / "data" if quick else data
        out.mkdir(parents=True, exist_ok=True)
        self.common = ["--image_root", data, "--on_bad_sample", "skip", "--bf16", "true", "--disable_tqdm", "true"]
        self.common += ["--dataloader_num_workers", "1"]
        self.common += ["--save_total_limit", "1", "--logging_steps", "23"]
        if quick:
            self.data.mkdir(exist_ok=True)
            for name, records in (("en_train", 200), ("cn_train", 200), ("en_val", 100), ("cn_val", 100)):
                captions = json.loads((data / f"{name}.json").read_text(encoding="utf-8"))[:records]
                (self.data / f"{name}.json").write_text(json.dumps(captions), encoding="utf-8")
        self.image_root = data

    def file(self, language: str, split: str) -> Path:
        return self.data / f"{language}_{split}.json"

    def train(self, name: str, *options) -> dict:
        """Runs train.py, unless its result is there, and measures what came out: the result."""
        folder = self.out / name
        options = [str(option) for option in (*options, *self.common, "--output_dir", folder)]
        if self.quick:
            length = 2 if "16" in options else 1
            options += ["--num_train_epochs", str(length), "--per_device_train_batch_size", "20"]
        done = folder / "result.json"
        if done.is_file():
            result = json.loads(done.read_text())
            if result["options"] == options:
                return result
            done.unlink()
        resume = ["--resume_from_checkpoint", "latest"] if name == "base" else ["--overwrite_output_dir"]
        print(f"{name}: {' '.join(options)}", flush=True)
        start = time.perf_counter()
        with open(self.out / f"{name}.log", "w") as log:
            command = [sys.executable, "train.py", *options, *resume]
            if subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode:
                sys.exit((self.out / f"{name}.log").read_text()[-3000:] + f"\n{name} failed: {log.name}")
        seconds = time.perf_counter() - start
        steps = json.loads((folder / "trainer_state.json").read_text())["global_step"]
        result = {"options": options, "seconds": seconds, "steps": steps, **self.measure(folder)}
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if name not in ("base", *SWEPT):
            (folder / "model.safetensors").unlink()
        write(done, result)
        return result

    def measure(self, folder: Path) -> dict:
        """Both languages: {"old": metrics, "new": metrics}."""
        from miniclip.inference.evaluator import RetrievalEvaluator
        from miniclip.inference.feature_cache import FeatureCache
        from miniclip.inference.load import load

        model, preprocess, tokenizer = load(folder)
        caches = FeatureCache(None, "", model.visual.width), None  # they share their images
        return {
            task: RetrievalEvaluator(records, preprocess, tokenizer, caches=caches)(model)
            for task, records in self.records().items()
        }

    def records(self) -> dict[str, list[dict]]:
        from miniclip.datasets.read import read_captions

        files = {task: self.file(language, "val") for task, language in LANGUAGES.items()}
        return {task: read_captions(file, self.image_root, check_images=False) for task, file in files.items()}

    def base(self, given: Path | None) -> tuple[Path, dict]:
        """The model that is fine-tuned, and its result."""
        start, name = self.out / "base.txt", str(given or "trained here")
        if start.is_file() and start.read_text() != name:
            sys.exit(f"{self.out} has runs from another base ({start.read_text()}): give another --out")
        start.write_text(name)
        if given:
            done = self.out / "base.json"
            if not done.is_file() or json.loads(done.read_text())["options"] != [str(given)]:
                write(done, {"options": [str(given)], "seconds": 0, "steps": 0, **self.measure(given)})
            return given, json.loads(done.read_text())
        files = ["--train_file", self.file("en", "train"), "--eval_file", self.file("en", "val")]
        options = ["recipes/flickr8k.json", "--model", "ViT-S-28-112", "--num_train_epochs", "30", *files]
        options += ["--crop_scale", "0.5", "--color_jitter", "0", "--ema", "0"]  # a quicker base than the recipe's
        return self.out / "base", self.train("base", *options)

    def fine_tune(self, name: str, base: Path) -> dict:
        given = RUNS[name][1]
        start = ["--model", base, "--train_file", self.file("cn", "train")]
        if "--early_stopping_patience" in given:
            start += ["--eval_file", self.file("cn", "val")]
        else:
            start += ["--holdout", "0"]
        options = {f"--{option}": str(value) for option, value in FINE_TUNE.items()}
        if "--early_stopping_patience" in given:
            options["--save_strategy"] = "epoch"
        options |= dict(zip(given[::2], given[1::2]))
        return self.train(name, *start, *(word for pair in options.items() for word in pair))

    def sweep(self, name: str, base: Path) -> list[dict]:
        """The models between the base and a fine-tuned one, measured."""
        done = self.out / name / "wise_ft.json"
        if not done.is_file() or done.stat().st_mtime < (self.out / name / "result.json").stat().st_mtime:
            from miniclip.inference.load import load
            from miniclip.training.wise_ft import sweep

            print(f"sweep: {base} to {self.out / name}", flush=True)
            (before, *_), (after, preprocess, tokenizer) = load(base), load(self.out / name)
            alphas = [0, 0.5, 1] if self.quick else [number / 10 for number in range(11)]
            write(done, sweep(before, after, preprocess, tokenizer, self.records(), alphas))
        return json.loads(done.read_text())

    def inherit(self, base: Path) -> dict[str, dict]:
        """A smaller model, trained on the English captions from slices of the base and from random weights."""
        config, heir = self.out / "small.json", self.out / "heir-start"
        write(config, SMALL)
        if not (heir / "model.safetensors").is_file():
            command = ["-m", "miniclip", "inherit", "--from", base, "--to", config, "--output_dir", heir]
            subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
        options = {
            **FINE_TUNE,
            "learning_rate": 1e-3,
            "weight_decay": 0.2,
            "holdout": 0,
            "train_file": self.file("en", "train"),
        }
        words = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
        return {
            "from slices of the base": self.train("heir", "--model", heir, *words),
            "from random weights": self.train("random", "--model", config, *words),
        }


def write(path: Path, values):
    """Writes JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)


def shares(result: dict) -> list[str]:
    """The cells of a row: both tasks and their mean, in percent."""
    cells = [
        f"{100 * result[task][metric]:.1f}"
        for task in ("old", "new") for metric in ("mean_recall", "text_to_image_R@10", "image_to_text_R@10")
    ]  # fmt: skip
    return [*cells, f"{100 * mean(result):.1f}"]


def mean(result: dict) -> float:
    return (result["old"]["mean_recall"] + result["new"]["mean_recall"]) / 2


def forgetting_table(base: dict, runs: dict[str, dict], sweeps: dict[str, list[dict]]) -> str:
    """Markdown: the base, every run, and of every sweep the middle and the best."""
    rows = [
        ["", "English: mean recall", "t to i R@10", "i to t R@10", "Chinese: mean recall", "t to i R@10",
         "i to t R@10", "mean of both", "steps", "minutes"],
        ["---"] * 10,
        ["before fine-tuning", *shares(base), "", ""],
    ]  # fmt: skip
    for name, result in runs.items():
        label, options = RUNS[name]
        label += f" (`{' '.join(options)}`)" if options else ""
        rows.append([label, *shares(result), str(result["steps"]), f"{result['seconds'] / 60:.1f}"])
    for name, found in sweeps.items():
        for which, entry in wise_rows(found):
            rows.append([f"WiSE-FT of: {SWEPT[name]} ({which})", *shares(entry), "", ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def wise_rows(found: list[dict]) -> list[tuple[str, dict]]:
    """The entries of alpha 0.5 and of the best mean recall."""
    from miniclip.training.wise_ft import best

    alpha, entries = best(found), {entry["alpha"]: entry for entry in found}
    middle = [] if alpha == 0.5 else [("alpha 0.5", entries[0.5])]
    return [*middle, (f"alpha {alpha:g}, the best mean", entries[alpha])]


def draw(path: Path, base: dict, runs: dict[str, dict], sweeps: dict[str, list[dict]]):
    """Old recall against new: a numbered dot for each run, a line for each sweep."""
    from miniclip.reports import style
    from miniclip.reports.charts import percent_axis

    @style.styled()
    def draw_styled():
        figure = style.new_figure(style.WIDTH, 6.4)
        figure.suptitle("Fine-tuning on Chinese captions: what is learned, what is forgotten", x=0.01, ha="left")
        axes = figure.subplots()
        results = {"before fine-tuning": base, **{RUNS[name][0]: result for name, result in runs.items()}}
        for number, (label, result) in enumerate(results.items()):
            point, color = [result[task]["mean_recall"] for task in ("old", "new")], style.GREY if number else style.RED
            axes.plot(*point, "o", color=color, label=f"{number}  {label}")
            axes.annotate(str(number), point, (5, 4), textcoords="offset points", color=color)
        for name, found in sweeps.items():
            points = [[entry[task]["mean_recall"] for entry in found] for task in ("old", "new")]
            axes.plot(*points, marker="", linewidth=1.4, label=f"WiSE-FT: {SWEPT[name]}")
        axes.set(xlabel="mean recall, English (right: kept)", ylabel="mean recall, Chinese (up: learned)")
        axes.set(xlim=(0, None), ylim=(0, None))
        percent_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        figure.legend(loc="outside right upper", labelspacing=0.9)
        style.save_png(path, figure)

    draw_styled()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "flickr8k", help="en_train.json, cn_val.json, ...")
    parser.add_argument("--base", type=Path, help="folder of the model to fine-tune, instead of training one")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: runs/forgetting, or -quick)")
    parser.add_argument("--only", nargs="+", choices=[*RUNS, "inherit"], help="these runs alone; nothing goes to docs/")
    parser.add_argument("--quick", action="store_true", help="200 images, one epoch; nothing goes to docs/")
    options = parser.parse_args()
    out = (options.out or ROOT / "runs" / ("forgetting-quick" if options.quick else "forgetting")).resolve()
    study = Study(options.data.resolve(), out, options.quick)
    base, before = study.base(options.base and options.base.resolve())
    runs = {name: study.fine_tune(name, base) for name in RUNS if not options.only or name in options.only}
    sweeps = {name: study.sweep(name, base) for name in SWEPT if name in runs}
    heirs = study.inherit(base) if not options.only or "inherit" in options.only else {}

    docs = DOCS if not options.quick and not options.only else out
    about = f"{machine()}. `python benchmarks/forgetting.py`, one run each; recalls in percent, of"
    about += f" {len(study.records()['old']):,} images, 5 captions each in each language."
    sections = {}
    if runs:
        picture = "![English recall against Chinese recall, a dot for each remedy](forgetting.png)"
        sections["forgetting"] = f"{about}\n\n{forgetting_table(before, runs, sweeps)}\n\n{picture}"
        draw(docs / "forgetting.png", before, runs, sweeps)
    if "plain" in sweeps:
        from miniclip.reports.charts import draw_sweep
        from miniclip.training.wise_ft import best, format_sweep

        picture = "![both recalls over alpha](wise_ft.png)"
        sections["wise_ft"] = f"{format_sweep(sweeps['plain'])}\n\n{picture}"
        title = "WiSE-FT: English (old) to Chinese (new), plain fine-tuning"
        draw_sweep(docs / "wise_ft.png", sweeps["plain"], best(sweeps["plain"]), title)
    if heirs:
        rows = ["| start | English: mean recall | t to i R@10 | i to t R@10 | steps |", "|---|---|---|---|---|"]
        rows += [f"| {start} | {' | '.join(shares(r)[:3])} | {r['steps']} |" for start, r in heirs.items()]
        sections["inherit"] = "\n".join(rows)
    for name, text in sections.items():
        write_section(name, text, docs / "finetuning.md")
        print(f"\n{text}")
    print(f"\nwritten to {docs / 'finetuning.md'}")


if __name__ == "__main__":
    main()
