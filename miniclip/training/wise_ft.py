"""How much of the old model should the new one keep?

Between the weights before fine-tuning and those after it lies a line, and the models on it are often better than both
ends: most of what was learned, and most of what was known (WiSE-FT: Wortsman et al., arXiv 2109.01903):

    weights = (1 - alpha) before + alpha after

Here alpha is swept, each model measured on the new task and on the old one, and the sweep written as a table, as JSON
and as a picture. It costs no training:

    python -m miniclip wise_ft --before FOLDER --after FOLDER --new_file new.json --old_file old.json --output_dir DIR
"""

import copy

import torch
from tqdm.auto import tqdm

from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.evaluator import Tasks
from miniclip.inference.fast import inference_copy
from miniclip.model import MiniClip
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
