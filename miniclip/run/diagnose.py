"""Known failures of contrastive training. A check takes the log, oldest entry first, and returns a warning or None."""

import math

from miniclip.model import MAX_LOGIT_SCALE
from miniclip.reports.charts import curve

MAX_SCALE = round(math.exp(MAX_LOGIT_SCALE))


def best_loss(batch: int, scale: float) -> float:
    """The lowest contrastive loss of a batch of B pairs at logit scale s, in nats: ln(1 + (B - 1) e^(-sB/(B-1))). It
    takes equal embeddings for a pair, with cosines of -1 / (B - 1) to all others: a simplex (arXiv 2012.08465). At a
    scale of 1, 128 pairs reach 3.86 at best and 4.85 by guessing; from 14 on it is almost 0."""
    return math.log1p((batch - 1) * math.exp(-scale * batch / (batch - 1)))


def stays_at_chance(history: list[dict], batch: int, warmup: int = 0, entries: int = 10, steps: int = 40) -> str | None:
    """Warns if the last `entries` losses, logged after the warm-up and over at least `steps` steps, all came less than
    2% of the way from guessing, ln(batch), down to `best_loss`; `batch` counts the pairs of all processes."""
    last = [entry for entry in history if "loss" in entry][-entries:]
    last = [entry for entry in last if entry["step"] > warmup]
    if batch < 2 or len(last) < entries or last[-1]["step"] - last[0]["step"] < steps:
        return None
    chance = math.log(batch)
    lowest = [best_loss(batch, entry.get("logit_scale", MAX_SCALE)) for entry in last]
    if not all(entry["loss"] > chance - 0.02 * (chance - low) for entry, low in zip(last, lowest)):
        return None
    where = "at" if last[-1]["loss"] < 1.02 * chance else "above"
    return (
        f"the loss stays {where} chance level, ln({batch}) = {chance:.3f}: {last[0]['loss']:.3f} at step"
        f" {last[0]['step']}, {last[-1]['loss']:.3f} at step {last[-1]['step']}. The model learns nothing. Train on 128"
        " pairs only: if it cannot memorise those, check that the captions belong to their images. If it can, change"
        " --learning_rate by a factor of 10 (too high drives the loss to chance level; good values are 1e-3 from"
        " scratch, 1e-5 to fine-tune) and raise --warmup_steps"
    )


def scale_at_limit(history: list[dict], entries: int = 5) -> str | None:
    """Warns if the last `entries` logit scales are within half a percent of the maximum, 100."""
    scales = [entry["logit_scale"] for entry in history if "logit_scale" in entry]
    if len(scales) < entries or min(scales[-entries:]) < 0.995 * MAX_SCALE:
        return None
    since = "where it was since the start" if scales[0] >= 0.995 * MAX_SCALE else f"from {scales[0]:.3g}"
    return (
        f"the logit scale has reached its maximum of 100 (temperature 0.01), {since}. While recall rises that is normal"
        " for OpenAI's weights and millions of pairs; for few pairs it is memorisation. Try a lower --learning_rate, a"
        " larger batch, fewer epochs, augmentation (--crop_scale 0.5, --hflip 0.5) or --fixed_logit_scale"
    )


def scale_collapses(history: list[dict], entries: int = 5) -> str | None:
    """Warns if the last `entries` logit scales fell below half of the first one or below 2, and the last is lowest."""
    scales = [entry["logit_scale"] for entry in history if "logit_scale" in entry]
    last = scales[-entries:]
    if len(last) < entries or max(last) > max(scales[0] / 2, 2) or last[-1] > min(last) or scales[0] == last[-1]:
        return None
    return (
        f"the logit scale has dropped to {last[-1]:.3g} (temperature {1 / last[-1]:.2g}) from {scales[0]:.3g} and does"
        " not recover: the embeddings got worse, usually by too high a learning rate. Lower --learning_rate, raise"
        " --warmup_steps, and check that the captions belong to their images"
    )


def recall_falls(history: list[dict], evaluations: int = 2) -> str | None:
    """Warns if mean recall falls while the loss falls: the last `evaluations` are at least 2% (of it) below the best
    one, and the mean loss between the last two is at least 1% below the mean loss before the best."""
    recalls, losses = curve(history, "eval_mean_recall"), curve(history, "loss")
    if not recalls:
        return None
    best = max(range(len(recalls)), key=lambda n: recalls[n][1])
    ago, ends = len(recalls) - 1 - best, [step for step, _ in recalls]
    if ago < evaluations or max(value for _, value in recalls[-evaluations:]) > 0.98 * recalls[best][1]:
        return None

    def mean_loss(n: int) -> float:  # between evaluation n and the one before it
        stretch = [loss for step, loss in losses if (ends[n - 1] if n else -1) < step <= ends[n]]
        return sum(stretch) / len(stretch) if stretch else math.nan

    before, now = mean_loss(best), mean_loss(len(recalls) - 1)
    before = mean_loss(best + 1) if math.isnan(before) else before  # an evaluation before the first step
    if not now < 0.99 * before:
        return None
    return (
        f"mean recall was best at step {ends[best]}, {ago} evaluations ago, {recalls[best][1]:.1%}, and is"
        f" {recalls[-1][1]:.1%} now, while the loss fell from {before:.3f} to {now:.3f}: the model overfits. Take the"
        " best checkpoint (--load_best_model_at_end with the same --eval_strategy and --save_strategy), train for fewer"
        " epochs, lower --learning_rate, raise --weight_decay, augment (--crop_scale 0.5, --hflip 0.5) or add pairs"
    )
