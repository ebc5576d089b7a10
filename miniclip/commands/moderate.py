"""The command `moderate`: yes/no questions about images, and moderation."""

import argparse

from miniclip.classify.images import find_images
from miniclip.commands.common import cell, common_options, embed_usable, finish, open_model
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip moderate", description="Decides whether images show a thing, or may be shown."
    )
    parser.add_argument("--ask", metavar="THING", help='a yes/no question: "a dog"; without it, all categories')
    parser.add_argument("--against", nargs="+", help="with --ask: texts for the answer no (default: a photo, ...)")
    parser.add_argument("--categories", help="a JSON file of categories and their texts (docs/classify.md)")
    parser.add_argument("--examples", help="labelled images for the thresholds: folders yes and no, or by category")
    common_options(parser, "moderation")
    options = parser.parse_args(argv)

    from miniclip.classify import moderate
    from miniclip.classify.prompts import warn_of_poor_coverage
    from miniclip.utils.bad_samples import BadSamples

    categories = moderate.read_categories(options.categories) if options.categories else moderate.CATEGORIES
    if options.ask is not None and not options.ask.strip():
        raise InputError('--ask needs a thing to ask for, such as "a dog"')
    if options.ask and options.categories or options.against and not options.ask:
        raise InputError("--against needs --ask, and --ask excludes --categories")
    images = find_images(options.images)
    model, preprocess, tokenizer = open_model(options)
    bad_samples = BadSamples()
    if options.ask:
        wanted, no = ["yes"], "no"
        warn_of_poor_coverage(tokenizer, [options.ask])
        score = lambda embeds: {"yes": moderate.ask(model, tokenizer, embeds, options.ask, options.against)}  # noqa: E731
    else:
        wanted, no = moderate.banned(categories), moderate.HARMLESS
        warn_of_poor_coverage(tokenizer, wanted)
        score = lambda embeds: moderate.category_scores(model, tokenizer, embeds, categories)  # noqa: E731
    review = moderate.THRESHOLD if options.ask else moderate.REVIEW
    thresholds = {name: {"threshold": moderate.THRESHOLD, "review": review} for name in wanted}
    if options.examples:
        about = (wanted, no, score, options, model, preprocess, bad_samples)
        thresholds |= calibrate_from(options.examples, *about)
    images, embeds = embed_usable(options, model, preprocess, images, bad_samples)
    scores = score(embeds)
    results = []
    for row, (path, _) in enumerate(images):
        each = {name: float(values[row]) for name, values in scores.items()}
        if options.ask:
            answer = {"answer": "yes" if each["yes"] >= thresholds["yes"]["threshold"] else "no", "score": each["yes"]}
        else:
            answer = {**moderate.decide(each, thresholds), "scores": each}
        results.append({"image": path, **answer})
    verdict, number = ("answer", "score") if options.ask else ("status", "confidence")
    lines = [f"| image | {verdict} | reason | {number} |", "|---|---|---|---|"]
    for r in results:
        lines.append(f"| {cell(r['image'])} | {r[verdict]} | {r.get('reason', options.ask)} | {r[number]:.2f} |")
    counts = {kind: sum(r[verdict] == kind for r in results) for kind in dict.fromkeys(r[verdict] for r in results)}
    about = {"model": str(options.model), "ask": options.ask, "thresholds": thresholds,
             "calibrated": bool(options.examples)}  # fmt: skip
    print("\n".join(lines[:22] + [f"| and {len(lines) - 22} more | | | |"] * (len(lines) > 22)))
    for name, limits in thresholds.items():
        on = f"balanced accuracy {limits['balanced_accuracy']:.2f} on" if len(limits) > 2 else "without"
        review = "" if options.ask else f", review from {limits['review']:.3f}"
        print(f"{name}: threshold {limits['threshold']:.3f}{review} ({on} examples)")
    summary = f"{counts} of {len(results)} images"
    finish(options, "moderation", {**about, "pictures": results}, "\n".join(lines), bad_samples, summary)


def calibrate_from(folder: str, wanted: list[str], no: str, score, options, model, preprocess, bad_samples) -> dict:
    """Returns the thresholds of the classes `wanted` from labelled images, each folder of a class against the folder
    `no`. `score(embeds)` returns {name: scores}. Raises InputError if `no`, or all others, are missing."""
    import numpy as np

    from miniclip.classify.moderate import calibrate

    found = find_images([folder])
    there = {name for _, name in found}
    if no not in there or not there & set(wanted):
        raise InputError(f"--examples {folder}: expected a folder {no!r} in it, and some of {', '.join(wanted)}")
    if unknown := [name for name in there if name not in (no, *wanted)]:
        raise InputError(f"--examples {folder}: {unknown[0]!r} is not one of {', '.join([no, *wanted])}: rename it")
    found, embeds = embed_usable(options, model, preprocess, found, bad_samples)
    scores, names = score(embeds), np.array([name for _, name in found])
    thresholds = {}
    for name in [name for name in wanted if name in there]:
        try:
            thresholds[name] = calibrate(scores[name][names == name], scores[name][names == no])
        except InputError as error:
            raise InputError(f"--examples {folder}: {name}: {error}") from None
    return thresholds
