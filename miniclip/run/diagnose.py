"""TODO docstring."""

import math
from itertools import islice

from miniclip.model import MAX_LOGIT_SCALE
from miniclip.reports.charts import curve

# What goes wrong. Each function takes the log's entries, oldest first, and gives a warning or None.


def best_loss(batch: int, scale: float) -> float:
    """The lowest contrastive loss that a batch of B pairs can have at a logit scale s: ln(1 + (B - 1) e^(-sB/(B-1))).

    In nats. It takes matching vectors that are equal, and others that form a simplex with cosines of -1 / (B - 1) (Lu
    and Steinerberger, arXiv 2012.08465). At a scale of 14 or more it is next to nothing; at a scale of 1, bare cosines,
    128 pairs cannot get below 3.86, where guessing gives 4.85.
    """
    return math.log1p((batch - 1) * math.exp(-scale * batch / (batch - 1)))


def stays_at_chance(history: list[dict], batch: int, warmup: int = 0, entries: int = 10, steps: int = 40) -> str | None:
    """Is the loss no better than guessing, ln(batch)?

    It is where each of the last `entries` losses, logged after the warm-up and `steps` steps or more apart in all, has
    come less than 2% of the way from ln(batch) down to `best_loss`; a loss above ln(batch) has come none of it. `batch`
    counts the pairs that are contrasted with one another, of all processes.
    """
    last = _last(history, "loss", entries)
    after = [entry for entry in last if entry["step"] > warmup]
    if batch < 2 or len(after) < entries or after[-1]["step"] - after[0]["step"] < steps:
        return None
    chance = math.log(batch)
    for entry in after:
        lowest = best_loss(batch, entry.get("logit_scale", MAX_SCALE))
        if not entry["loss"] > chance - 0.02 * (chance - lowest):
            return None
    where = "at" if after[-1]["loss"] < 1.02 * chance else "above"
    return (
        f"the loss stays {where} that of guessing, ln({batch}) = {chance:.3f}: {after[0]['loss']:.3f} at step"
        f" {after[0]['step']}, {after[-1]['loss']:.3f} at step {after[-1]['step']}. Nothing is learned. Try to learn"
        " 128 pairs by heart first (a caption file with those alone): if that fails too, look whether the captions"
        " belong to their images; if not, change --learning_rate by a factor of 10 (too low leaves the loss where it"
        " is, too high drives it there; sound are 1e-3 from scratch and 1e-5 to fine-tune) and raise --warmup_steps"
    )


def scale_at_limit(history: list[dict], entries: int = 5) -> str | None:
    """Has the logit scale come to its limit? It has where the last `entries` are within half a percent of 100."""
    last = _last(history, "logit_scale", entries)
    if len(last) < entries or not all(entry["logit_scale"] >= 0.995 * MAX_SCALE for entry in last):
        return None
    first = next(entry for entry in history if "logit_scale" in entry)
    if first["logit_scale"] >= 0.995 * MAX_SCALE:
        return (
            "the logit scale has been at its limit of 100 (temperature 0.01) since the start, where OpenAI's weights"
            " come from: that is no fault while recall rises. Where it does not, lower --learning_rate"
        )
    return (
        f"the logit scale has come to its limit of 100 (temperature 0.01) from {first['logit_scale']:.3g}: the model"
        " tells the pairs of a batch apart, and the loss falls only by being surer. With millions of pairs that is"
        " usual; with few it means learning by heart. Try a larger batch (harder negatives), fewer epochs, more"
        " augmentation (--crop_scale 0.5, --hflip 0.5), or keep the scale by --fixed_logit_scale"
    )


def scale_collapses(history: list[dict], entries: int = 5) -> str | None:
    """Does the logit scale fall towards 1? It does where the last `entries` are below half of the first, or below 2,
    and the last is not above the others. Of a scale that is kept fixed the log is level: no warning."""
    last = [entry["logit_scale"] for entry in _last(history, "logit_scale", entries)]
    first = next((entry["logit_scale"] for entry in history if "logit_scale" in entry), 0)
    level = max(first / 2, 2)
    if len(last) < entries or max(last) > level or last[-1] > min(last) or first == last[-1]:
        return None
    return (
        f"the logit scale has fallen to {last[-1]:.3g} (temperature {1 / last[-1]:.2g}) from {first:.3g}, and goes on:"
        " the model takes back its bets because its embeddings became worse, as a rate does that is too high. Lower"
        " --learning_rate, raise --warmup_steps, and look whether the captions belong to their images"
    )


def recall_falls(history: list[dict], evaluations: int = 2) -> str | None:
    """Does recall fall while the loss falls? It does where the last `evaluations` gave a mean recall at least 2% of the
    best one's below it, and the mean loss between the last two is at least 1% below that before the best one."""
    recalls, losses = curve(history, "eval_mean_recall"), curve(history, "loss")
    if not recalls:
        return None
    best = max(range(len(recalls)), key=lambda n: recalls[n][1])
    ago, ends = len(recalls) - 1 - best, [step for step, _ in recalls]
    if ago < evaluations or max(value for _, value in recalls[-evaluations:]) > 0.98 * recalls[best][1]:
        return None

    def mean_loss(n: int) -> float:  # of the stretch that evaluation n closes
        stretch = [loss for step, loss in losses if (ends[n - 1] if n else -1) < step <= ends[n]]
        return sum(stretch) / len(stretch) if stretch else math.nan

    before, now = mean_loss(best), mean_loss(len(recalls) - 1)
    before = mean_loss(best + 1) if math.isnan(before) else before  # an evaluation before the first step
    if not now < 0.99 * before:
        return None
    return (
        f"mean recall was best at step {ends[best]}, {ago} evaluations ago, {recalls[best][1]:.1%}, and is"
        f" {recalls[-1][1]:.1%} now, while the loss fell from {before:.3f} to {now:.3f}: the model learns the training"
        " pairs by heart. Take the best checkpoint (--load_best_model_at_end with the same --eval_strategy and"
        " --save_strategy), or fewer epochs; against it help a lower --learning_rate, a higher --weight_decay, more"
        " augmentation (--crop_scale 0.5, --hflip 0.5) and more pairs"
    )


def _last(history: list[dict], key: str, n: int) -> list[dict]:
    """The last n entries that have a key, oldest first."""
    return list(islice((entry for entry in reversed(history) if key in entry), n))[::-1]


MAX_SCALE = round(math.exp(MAX_LOGIT_SCALE))
