"""Yes/no questions about images, and moderation.

Probabilities among classes add up to 1, so one of six banned classes always looks likely, even on a harmless image. A
question about one class needs an alternative: texts that say nothing (a photo), or that name harmless things, each of
which may win. "A photo without a dog" is none: CLIP does not understand negation (docs/classify.md has the numbers)."""

from pathlib import Path

import numpy as np
import torch

from miniclip.classify.images import find_images
from miniclip.classify.prompts import TEXTS
from miniclip.classify.zero_shot import embed_classes, shares
from miniclip.datasets.records import parse_json, read_text
from miniclip.utils.errors import InputError

ASK = ["a photo of {}", "a photo with {} in it", "{}"]
NOTHING = ["a photo", "a picture", "an image"]  # the alternative of a question, as one class
HARMLESS = "harmless"
CATEGORIES = TEXTS["categories"]  # each is the mean of its texts; those of HARMLESS are separate classes
THRESHOLD, REVIEW = 0.5, 0.25  # defaults without examples


def ask(model, tokenizer, image_embeds: np.ndarray, thing: str, against: list[str] | None = None) -> np.ndarray:
    """Returns the probability (N,) that images (N, E) show a thing ("a dog"), against NOTHING or each of some texts."""
    against = [[text] for text in against] if against else [NOTHING]
    vectors = embed_classes(model, tokenizer, [[text.format(thing) for text in ASK], *against])
    return shares(model, image_embeds, vectors)[:, 0]


def category_scores(model, tokenizer, image_embeds: np.ndarray, categories: dict) -> dict[str, np.ndarray]:
    """Returns the probability of each category for images, {name: (N,)}, each alone against the HARMLESS texts."""
    names = [name for name in categories if name != HARMLESS]
    positives = embed_classes(model, tokenizer, [categories[name] for name in names]).split(1, dim=1)
    negatives = embed_classes(model, tokenizer, [[text] for text in categories[HARMLESS]])
    each = [shares(model, image_embeds, torch.cat([one, negatives], dim=1))[:, 0] for one in positives]
    return dict(zip(names, each))


def calibrate(yes: np.ndarray, no: np.ndarray) -> dict[str, float]:
    """Returns `{"threshold", "review", "balanced_accuracy"}` for the scores of examples with a class and without it.

    The threshold, halfway between two scores, maximises the balanced accuracy (the mean of both kinds'); among equals
    it is the lowest. `review` is the lowest score of an example with the class, or the threshold if lower. Raises
    InputError for fewer than two examples of a kind, and for scores that do not separate them."""
    if min(len(yes), len(no)) < 2:
        raise InputError(f"{len(yes)} examples with and {len(no)} without: at least 2 of each are needed")
    scores = np.unique(np.concatenate([yes, no]).astype(np.float64))
    middles = (scores[1:] + scores[:-1]) / 2
    accuracies = [((yes >= t).mean() + (no < t).mean()) / 2 for t in middles]
    if not accuracies or max(accuracies) <= 0.5:
        fault = "examples with it score no higher than those without: this model cannot tell them apart"
        raise InputError(f"{fault}. Use other words, or train a linear probe")
    best = int(np.argmax(np.round(accuracies, 12)))
    threshold, accuracy = float(middles[best]), float(accuracies[best])
    return {"threshold": threshold, "review": min(threshold, float(yes.min())), "balanced_accuracy": accuracy}


def calibrate_from(folder: str, wanted: list[str], no: str, score, embed) -> dict:
    """Returns the thresholds of the classes `wanted` from labelled images, each folder of a class against the folder
    `no`. `score(embed(images))` is {name: scores}. Raises InputError if `no`, or all others, are missing."""
    found = find_images([folder])
    there = {name for _, name in found}
    if no not in there or not there & set(wanted):
        raise InputError(f"--examples {folder}: expected a folder {no!r} in it, and some of {', '.join(wanted)}")
    if unknown := [name for name in there if name not in (no, *wanted)]:
        raise InputError(f"--examples {folder}: {unknown[0]!r} is not one of {', '.join([no, *wanted])}: rename it")
    found, embeds = embed(found)
    scores, names, thresholds = score(embeds), np.array([name for _, name in found]), {}
    for name in [name for name in wanted if name in there]:
        try:
            thresholds[name] = calibrate(scores[name][names == name], scores[name][names == no])
        except InputError as error:
            raise InputError(f"--examples {folder}: {name}: {error}") from None
    return thresholds


def decide(scores: dict[str, float], thresholds: dict[str, dict]) -> dict:
    """Returns `{"status", "reason", "confidence"}` for an image's scores: rejected if one reaches its category's
    threshold, else review if one reaches "review", for the highest of these; else approved, at 1 minus the highest."""
    for status, limit in ("rejected", "threshold"), ("review", "review"):
        if reached := {name: score for name, score in scores.items() if score >= thresholds[name][limit]}:
            reason = max(reached, key=reached.get)
            return {"status": status, "reason": reason, "confidence": float(reached[reason])}
    return {"status": "approved", "reason": HARMLESS, "confidence": float(1 - max(scores.values()))}


def read_categories(path: str | Path) -> dict[str, list[str]]:
    """Reads a JSON file in the form of CATEGORIES. Raises InputError, which names the file."""
    found = parse_json(read_text(Path(path)), path)
    form = f'{path}: expected {{"{HARMLESS}": [texts], "a category": [texts], ...}}'
    if not isinstance(found, dict) or HARMLESS not in found or len(found) < 2:
        raise InputError(form)
    for name, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError(f"{form}; {name!r} has no list of texts")
    return found
