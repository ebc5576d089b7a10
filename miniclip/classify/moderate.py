"""Does a picture show this one thing? May it be shown to others?

Probabilities among classes add up to 1, so that of six banned classes one always looks likely, on a harmless picture
too. A question about one class needs something to answer "no" with: here texts that say nothing (a photo), or that name
harmless things, each of which may win. The probability is that of the class among these, by the model's temperature:

    python -m miniclip moderate --model runs/mine --images photos --ask "a dog" --examples labelled
    python -m miniclip moderate --model runs/mine --images photos --examples labelled

The second asks about each category of CATEGORIES and gives `{"status": "approved", "rejected" or "review", "reason",
"confidence"}`. "A photo without a dog" is no answer: CLIP does not read negation (docs/classify.md has the numbers).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.classify.zero_shot import embed_classes
from miniclip.utils.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
ASK = ["a photo of {}", "a photo with {} in it", "{}"]
NOTHING = ["a photo", "a picture", "an image"]  # what a question is asked against, as one class
HARMLESS = "harmless"
CATEGORIES = {  # each the mean of its texts; those of HARMLESS are classes of their own
    HARMLESS: ["a photo", "a photo of a person", "a photo of people", "a photo of children playing",
               "a photo of an animal", "a photo of a landscape", "a photo of a city street", "a photo of a building",
               "a photo of a room", "a photo of food", "a photo of an everyday object", "a photo of sports",
               "a drawing", "a screenshot of text"],
    "violence": ["a photo of violence", "a photo of people fighting and hurting each other", "a bloody injury"],
    "nudity": ["a photo of nudity", "a photo of a naked person"],
    "hate symbol": ["a photo of a hate symbol", "a swastika", "a flag of a hate group"],
    "weapon": ["a photo of a weapon", "a photo of a gun", "a person who holds a rifle or a knife"],
    "alcohol": ["a photo of alcohol", "a bottle of beer, wine or liquor", "people drinking alcohol"],
    "tobacco": ["a photo of tobacco", "a photo of a cigarette", "a person smoking"],
}  # fmt: skip
THRESHOLD, REVIEW = 0.5, 0.25  # unless examples say better


def probability_against(model, image_embeds: np.ndarray, positive: Tensor, negatives: Tensor) -> np.ndarray:
    """How likely one class is, for images (N, E): (N,). `positive` (E,) is its vector, `negatives` (E, M) those of what
    else it may be: softmax over all of them, by the model's temperature, of which the class has its share."""
    import torch

    from miniclip.classify.zero_shot import probabilities

    return probabilities(model, image_embeds, torch.cat([positive[:, None], negatives], dim=1))[:, 0]


def ask(model, tokenizer, image_embeds: np.ndarray, thing: str, against: list[str] | None = None) -> np.ndarray:
    """How likely images (N, E) show a thing, "a dog": (N,), 0 to 1, against texts that say nothing of it: NOTHING as
    one class, or each of `against`."""
    against = [[text] for text in against] if against else [NOTHING]
    vectors = embed_classes(model, tokenizer, [[text.format(thing) for text in ASK], *against])
    return probability_against(model, image_embeds, vectors[:, 0], vectors[:, 1:])


def category_scores(model, tokenizer, image_embeds: np.ndarray, categories: dict) -> dict[str, np.ndarray]:
    """How likely images (N, E) show each category: {name: (N,)}, each against the HARMLESS texts alone, so that it does
    not matter how many other categories there are."""
    harmless = [[text] for text in categories[HARMLESS]]
    vectors = embed_classes(model, tokenizer, [*harmless, *(categories[name] for name in banned(categories))])
    negatives, positives = vectors[:, : len(harmless)], vectors[:, len(harmless) :]
    return {
        name: probability_against(model, image_embeds, vector, negatives)
        for name, vector in zip(banned(categories), positives.T)
    }


def banned(categories: dict) -> list[str]:
    """The categories but for HARMLESS."""
    return [name for name in categories if name != HARMLESS]


def calibrate(yes: np.ndarray, no: np.ndarray) -> dict[str, float]:
    """`{"threshold", "review", "balanced_accuracy"}` from the scores of examples that show a class, and that do not.

    The threshold is that with the highest balanced accuracy (the mean of the shares of either kind that fall on their
    side), halfway between two neighbouring scores; of several the lowest, which misses least. `review` is the threshold
    or, if lower, the lowest score of an example that shows the class: between the two a person should look. Raises
    InputError for fewer than two examples of a kind, and for scores that tell nothing.
    """
    import numpy as np

    if min(len(yes), len(no)) < 2:
        raise InputError(f"{len(yes)} examples with and {len(no)} without: at least 2 of each are needed")
    scores = np.unique(np.concatenate([yes, no]).astype(np.float64))
    middles = (scores[1:] + scores[:-1]) / 2
    accuracies = [((yes >= t).mean() + (no < t).mean()) / 2 for t in middles]
    if not accuracies or max(accuracies) <= 0.5:
        raise InputError("examples with it score no higher than those without: this model cannot tell; describe it"
                         " in other words, or train a linear probe")  # fmt: skip
    best = int(np.argmax(np.round(accuracies, 12)))
    threshold = float(middles[best])
    return {"threshold": threshold, "review": min(threshold, float(yes.min())),
            "balanced_accuracy": float(accuracies[best])}  # fmt: skip


def decide(scores: dict[str, float], thresholds: dict[str, dict]) -> dict:
    """`{"status", "reason", "confidence"}` of a picture with the score of each category.

    Rejected where a score reaches its category's threshold, for review where one reaches "review"; the reason is that
    of these which has the highest score. Else approved, and the confidence is 1 less the highest score.
    """
    for status, limit in (("rejected", "threshold"), ("review", "review")):
        reached = {name: score for name, score in scores.items() if score >= thresholds[name][limit]}
        if reached:
            reason = max(reached, key=reached.get)
            return {"status": status, "reason": reason, "confidence": float(reached[reason])}
    return {"status": "approved", "reason": HARMLESS, "confidence": float(1 - max(scores.values()))}


def read_categories(path: str | Path) -> dict[str, list[str]]:
    """A JSON file in the form of CATEGORIES. Raises InputError, which names the file, for another one."""
    from miniclip.datasets.records import parse_json, read_text

    found = parse_json(read_text(Path(path)), path)
    form = f'{path}: expected {{"{HARMLESS}": [texts], "a category": [texts], ...}}'
    if not isinstance(found, dict) or HARMLESS not in found or len(found) < 2:
        raise InputError(form)
    for name, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError(f"{form}; {name!r} has no list of texts")
    return found
