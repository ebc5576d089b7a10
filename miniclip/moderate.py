"""Does a picture show this one thing? May it be shown to others?

Probabilities among classes add up to 1, so that of six banned classes one always looks likely, on a harmless picture
too. A question about one class needs something to answer "no" with: here texts that say nothing (a photo), or that name
harmless things, each of which may win. The probability is that of the class among these, by the model's temperature:

    python -m miniclip.moderate --model runs/mine --images photos --ask "a dog" --examples labelled
    python -m miniclip.moderate --model runs/mine --images photos --examples labelled

The second asks about each category of CATEGORIES and gives `{"status": "approved", "rejected" or "review", "reason",
"confidence"}`. "A photo without a dog" is no answer: CLIP does not read negation (docs/zero_shot.md has the numbers).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.config import InputError
from miniclip.options import run
from miniclip.zero_shot import cell, common_options, embed_classes, embed_pictures, find_pictures, open_model

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

    from miniclip.zero_shot import probabilities

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
    from miniclip.captions import parse_json, read_text

    found = parse_json(read_text(Path(path)), path)
    form = f'{path}: expected {{"{HARMLESS}": [texts], "a category": [texts], ...}}'
    if not isinstance(found, dict) or HARMLESS not in found or len(found) < 2:
        raise InputError(form)
    for name, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError(f"{form}; {name!r} has no list of texts")
    return found


def calibrate_from(folder: str, wanted: list[str], no: str, score, options, model, preprocess, bad_samples) -> dict:
    """The thresholds of each class wanted from labelled pictures: those in the folder named as it, against those in the
    folder `no`. `score(embeds)` gives {name: scores}. Raises InputError where `no`, or all others, are missing."""
    import numpy as np

    found = find_pictures([folder])
    there = {name for _, name in found}
    if no not in there or not there & set(wanted):
        raise InputError(f"--examples {folder}: expected a folder {no!r} in it, and some of {', '.join(wanted)}")
    if unknown := [name for name in there if name not in (no, *wanted)]:
        raise InputError(f"--examples {folder}: {unknown[0]!r} is none of {', '.join([no, *wanted])}: rename it")
    found, embeds = embed_pictures(options, model, preprocess, found, bad_samples)
    scores, names = score(embeds), np.array([name for _, name in found])
    thresholds = {}
    for name in [name for name in wanted if name in there]:
        try:
            thresholds[name] = calibrate(scores[name][names == name], scores[name][names == no])
        except InputError as error:
            raise InputError(f"--examples {folder}: {name}: {error}") from None
    return thresholds


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip.moderate", description="Asks of pictures whether they show a thing, or may be shown."
    )
    parser.add_argument("--ask", metavar="THING", help='a yes/no question: "a dog"; without it, all categories')
    parser.add_argument("--against", nargs="+", help="texts for the answer no, with --ask (default: a photo, ...)")
    parser.add_argument("--categories", help="a JSON file of categories and their texts (docs/zero_shot.md)")
    parser.add_argument("--examples", help="labelled pictures for the thresholds: folders yes and no, or by category")
    common_options(parser, "moderation")
    options = parser.parse_args(argv)
    categories = read_categories(options.categories) if options.categories else CATEGORIES
    if options.ask is not None and not options.ask.strip():
        raise InputError('--ask: say what to ask for: "a dog"')
    if options.ask and options.categories or options.against and not options.ask:
        raise InputError("--ask goes with --against, and without --categories")
    pictures = find_pictures(options.images)

    from miniclip.bad_samples import NAME, BadSamples
    from miniclip.files import write_json, write_text
    from miniclip.prompts import warn_if_illegible

    model, preprocess, tokenizer = open_model(options)
    bad_samples = BadSamples()
    if options.ask:
        wanted, no = ["yes"], "no"
        warn_if_illegible(tokenizer, [options.ask])
        score = lambda embeds: {"yes": ask(model, tokenizer, embeds, options.ask, options.against)}  # noqa: E731
    else:
        wanted, no = banned(categories), HARMLESS
        warn_if_illegible(tokenizer, wanted)
        score = lambda embeds: category_scores(model, tokenizer, embeds, categories)  # noqa: E731
    thresholds = {name: {"threshold": THRESHOLD, "review": THRESHOLD if options.ask else REVIEW} for name in wanted}
    if options.examples:
        about = (wanted, no, score, options, model, preprocess, bad_samples)
        thresholds |= calibrate_from(options.examples, *about)
    pictures, embeds = embed_pictures(options, model, preprocess, pictures, bad_samples)
    scores = score(embeds)
    results = []
    for row, (path, _) in enumerate(pictures):
        each = {name: float(values[row]) for name, values in scores.items()}
        if options.ask:
            answer = {"answer": "yes" if each["yes"] >= thresholds["yes"]["threshold"] else "no", "score": each["yes"]}
        else:
            answer = {**decide(each, thresholds), "scores": each}
        results.append({"image": path, **answer})
    verdict, number = ("answer", "score") if options.ask else ("status", "confidence")
    lines = [f"| picture | {verdict} | reason | {number} |", "|---|---|---|---|"]
    for r in results:
        lines.append(f"| {cell(r['image'])} | {r[verdict]} | {r.get('reason', options.ask)} | {r[number]:.2f} |")
    counts = {kind: sum(r[verdict] == kind for r in results) for kind in dict.fromkeys(r[verdict] for r in results)}
    folder = Path(options.output_dir)
    about = {"model": str(options.model), "ask": options.ask, "thresholds": thresholds,
             "calibrated": bool(options.examples)}  # fmt: skip
    write_json(folder / "moderation.json", {**about, "pictures": results})
    write_text(folder / "moderation.md", "\n".join(lines) + "\n")
    print("\n".join(lines[:22] + [f"| and {len(lines) - 22} more | | | |"] * (len(lines) > 22)))
    for name, limits in thresholds.items():
        on = f"balanced accuracy {limits['balanced_accuracy']:.2f} on" if len(limits) > 2 else "without"
        review = "" if options.ask else f", review from {limits['review']:.3f}"
        print(f"{name}: threshold {limits['threshold']:.3f}{review} ({on} examples)")
    print(f"{counts} of {len(results)} pictures. Written: moderation.json, moderation.md in {folder}")
    bad_samples.open(folder / NAME)
    if bad_samples:
        print(f"{len(bad_samples)} bad samples were left out: {bad_samples.path}")


if __name__ == "__main__":
    run(main)
