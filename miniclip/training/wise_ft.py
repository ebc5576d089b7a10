"""WiSE-FT: weights (1 - alpha) before + alpha after fine-tuning (Wortsman et al., arXiv 2109.01903), which often keep
most of the old task and most of the new one, without further training."""

import copy

import torch
from tqdm.auto import tqdm

from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.model import MiniClip
from miniclip.weights.interpolate import check_same, interpolate

ALPHAS = [number / 10 for number in range(11)]


def sweep(
    before: MiniClip, after: MiniClip, preprocess, tokenizer, records: dict[str, list[dict]], alphas=ALPHAS,
    precision: str = "fp32", batch_size: int = 64, num_workers: int | None = None, progress: bool = False,
) -> list[dict]:  # fmt: skip
    """Evaluates the models between two on caption sets by name. Returns, for each alpha,
    `{"alpha": alpha, "mean": mean of the mean recalls, name: metrics, ...}`. What the sets share is encoded once, and
    once for all alphas by a tower that is equal in both models. Raises InputError for different architectures."""
    check_same(before.config, after.config)
    weights = before.state_dict(), after.state_dict()
    model = copy.deepcopy(after)
    caches = FeatureCache(None, "", model.visual.width), FeatureCache(None, "", model.text.width)
    how = {"batch_size": batch_size, "num_workers": num_workers, "caches": caches}
    evaluators = {name: RetrievalEvaluator(task, preprocess, tokenizer, **how) for name, task in records.items()}
    learned = {name.partition(".")[0] for name in weights[0] if not torch.equal(*(w[name] for w in weights))}
    found = []
    for alpha in tqdm(alphas, "alphas", disable=not progress):
        model.load_state_dict(interpolate(*weights, alpha))
        for tower, cache in zip(("visual", "text"), caches):
            if tower in learned:
                cache.clear()
        for evaluator in evaluators.values():
            evaluator.positions = ()  # late interaction's caches, of the mix before
        fast = inference_copy(model, precision)
        metrics = {name: evaluator(fast) for name, evaluator in evaluators.items()}
        mean = sum(task["mean_recall"] for task in metrics.values()) / len(metrics)
        found.append({"alpha": alpha, "mean": mean, **metrics})
    return found


def best(found: list[dict]) -> float:
    """The alpha with the highest mean of both recalls; of equal ones the lowest, nearest to the old model."""
    return max(found, key=lambda entry: (entry["mean"], -entry["alpha"]))["alpha"]


COLUMNS = ["mean_recall", "text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@1", "image_to_text_R@10"]


def format_sweep(found: list[dict]) -> str:
    """A sweep of the tasks "new" and "old" as a Markdown table, in percent."""
    heads = [f"{task}: {metric.replace('_', ' ')}" for task in ("new", "old") for metric in COLUMNS]
    rows = [["alpha", *heads, "mean of both"], ["---"] * (len(heads) + 2)]
    for entry in found:
        shares = [entry[task][metric] for task in ("new", "old") for metric in COLUMNS]
        rows.append([f"{entry['alpha']:g}", *(f"{100 * share:.1f}" for share in (*shares, entry["mean"]))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
