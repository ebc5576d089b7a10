"""The model card (README.md with its YAML header) of a model on the Hugging Face hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from miniclip.model import MiniClip
from miniclip.utils.files import sha256
from miniclip.utils.weight_files import read_json

MARK = "<!-- written by `miniclip push`: without this line the card is yours, and later uploads keep it -->"
SHOWN = ("R@1", "R@5", "R@10", "mean_recall", "top1", "top5", "mean_per_class_recall")  # how shown metrics end
RECIPE = (  # options and arguments of run.json that say how a model was trained; what is None or off is left out
    "loss", "freeze_image", "freeze_text", "learning_rate", "weight_decay", "num_train_epochs", "max_steps",
    "warmup_steps", "lr_scheduler_type", "optim", "bf16", "fp16", "crop_scale", "hflip", "color_jitter",
    "patch_dropout", "layer_decay", "tower_lr_scales", "ema", "duplicates", "fixed_logit_scale", "seed",
)  # fmt: skip
TEXT = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n(?=<!-- |\Z)", TEXT, re.DOTALL))  # the card, and its uses
NAMES = {"miniclip": "MiniCLIP", "openclip": "OpenCLIP", "hf": "transformers"}


def write_card(model: MiniClip, repo: str, license: str, notes: dict[str, list[str] | str], run: Path | None) -> str:
    """Returns the text of a card. `notes` has, for each library, a list of what its form cannot hold, or the reason why
    it has no form of this model; `run` is the folder with run.json and the results of evaluate.py, if there is one."""
    from huggingface_hub import EvalResult, ModelCardData

    record = read_json(run / "run.json") if run else {}
    results = read_results(run, record) if run else []
    found = [
        EvalResult(
            task_type="zero-shot-image-classification" if name.startswith("zero_shot") else "image-text-retrieval",
            dataset_type="custom", dataset_name=dataset, metric_type=name, metric_name=name.replace("_", " "),
            metric_value=round(value, 4),
        )
        for dataset, metrics in results for name, value in metrics.items()
    ]  # fmt: skip
    forms = [form for form, note in notes.items() if isinstance(note, list)]
    library = "transformers" if "hf" in forms else "open_clip" if "openclip" in forms else "miniclip"
    name = repo.rpartition("/")[2]
    tags = ["clip", "miniclip", *(["open_clip"] if "openclip" in forms else [])]
    header = ModelCardData(
        license=license, library_name=library, pipeline_tag="zero-shot-image-classification", tags=tags,
        metrics=sorted({one.metric_type for one in found}) or None, eval_results=found or None, model_name=name,
    )  # fmt: skip
    image, text = (type(tower).__name__ for tower in (model.visual, model.text))
    return PARTS["card"].format(
        header=header.to_yaml(), mark=MARK, name=name, millions=sum(p.numel() for p in model.parameters()) / 1e6,
        image=image, text=text, activation="QuickGELU" if model.config.quick_gelu else "GELU",
        size=model.config.preprocess_cfg.size, length=model.text.tokenizer.context_length, dim=model.config.embed_dim,
        use="\n\n".join(use(form, note, repo) for form, note in notes.items()), training=describe_training(record),
        results=table(results), license=license,
    )  # fmt: skip


def use(form: str, note: list[str] | str, repo: str) -> str:
    if isinstance(note, str):
        return f"{NAMES[form]} cannot load this model: {note}."
    code = ", trust_remote_code=True" if any("trust_remote_code" in one for one in note) else ""  # else it asks
    return "\n\n".join([PARTS[form].format(repo=repo, code=code), *(f"Note: {one}." for one in note)])


def describe_training(record: dict) -> str:
    """Data and recipe, from a run's run.json. Of paths only the last part is told."""
    if not (options := record.get("options")):
        return "How this model was trained is not recorded."
    settings = options | (record.get("arguments") or {})
    rows = [("data", data(options.get("train_file"), record.get("data")))]
    rows += [("measured on", data(options.get("eval_file"), record.get("eval_data") or record.get("holdout")))]
    rows += [("start", " ".join(Path(options[k]).name for k in ("model", "pretrained") if options.get(k)))]
    rows += [("pairs per step", record.get("pairs_per_step"))]
    rows += [(name, settings.get(name)) for name in RECIPE]
    versions = record.get("versions") or {}
    known = [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    rows += [("versions", ", ".join(known))]
    lines = [f"| {name} | {value} |" for name, value in rows if value not in (None, "", False, -1, "none")]
    return "\n".join(["| | |", "|---|---|", *lines])


def data(source: str | None, about: dict | None) -> str:
    about = about or {}
    name = "::".join(Path(part).name for part in (source or "").split("::")) or ("a held-out part" if about else "")
    counts = [f"{about[kind]} {kind}" for kind in ("records", "images", "captions") if kind in about]
    return ": ".join(filter(None, [name, ", ".join(counts)]))


def read_results(run: Path, record: dict) -> list[tuple[str, dict[str, float]]]:
    """The metrics of the weights in a run's folder, by data set: those that evaluate.py wrote for these very weights,
    or else those of the last evaluation in the run."""
    weights = run / "model.safetensors"
    digest = sha256(weights) if weights.is_file() else None
    found = []
    for path in sorted(run.glob("retrieval_*.json")):
        result = read_json(path)
        if digest in ((result.get("record") or {}).get("sha256") or {}).values() and result.get("metrics"):
            found.append((Path(str(result.get("dataset"))).name, shown(result["metrics"])))
    if not found and (state := run / "trainer_state.json").is_file():  # of a long run, which may have logged NaN
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        last = [e for e in history if any(name.startswith("eval_") for name in e)][-1:]
        name = data((record.get("options") or {}).get("eval_file"), None) or "a held-out part of the training data"
        found = [(name, shown({k.removeprefix("eval_"): v for k, v in entry.items()})) for entry in last]
    return found


def shown(metrics: dict) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.endswith(SHOWN) and isinstance(value, float)}


def table(results: Sequence[tuple[str, dict[str, float]]]) -> str:
    if not results:
        return "Not measured."
    lines = ["In percent, over the whole evaluation set.", "", "| data | metric | % |", "|---|---|---|"]
    for dataset, metrics in results:
        lines += [f"| {dataset} | {name.replace('_', ' ')} | {100 * value:.1f} |" for name, value in metrics.items()]
    return "\n".join(lines)
