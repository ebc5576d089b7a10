"""Zero-shot classification: which of several classes an image shows, from the class names alone.

Reads images and class names, and writes zero_shot.json and zero_shot.md to --output_dir; for images in class folders
also the accuracy and confusion.png."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from miniclip.commands import common
from miniclip.utils.command_line import Parser, cell, printable, starting
from miniclip.utils.errors import InputError


def format_images(images: list[dict]) -> str:
    """Returns a Markdown table of the first images: the three best classes with their probabilities in percent."""
    rows = ["| image | class | then |", "|---|---|---|"]
    for image in images:
        first, *others = [f"{cell(name)} {100 * share:.1f}" for name, share in image["top"][:3]]
        rows.append(f"| {cell(image['image'])} | {first} | {', '.join(others)} |")
    return common.first_rows(rows)


def why_no_truth(paths: Sequence[str], images: list[tuple[str, str | None]]) -> str | None:
    """Returns why the true classes of images are unknown, where one might expect otherwise. `paths`: the arguments."""
    if len(loose := [path for path, folder in images if folder is None]) < len(images):
        return f"{loose[0]} is not in a class folder" if loose else "the folders are none of the classes"
    for top in filter(os.path.isdir, paths):
        if len({os.path.dirname(path) for path in loose if path.startswith(os.path.join(top, ""))}) > 1:
            return f"{top} has images beside its folders, which therefore are not class folders"
    return None


def main(argv: list[str]):
    parser = Parser.command("zero_shot", __doc__, '--model runs/mine --images photos --classes "dog,cat,horse"')
    common.share_class_flags(parser)
    common.share_image_flags(parser, "zero_shot", precision="auto")
    options = parser.parse_args(argv)
    with starting():
        import numpy as np

        from miniclip.classify.images import choose_classes, find_images
        from miniclip.classify.prompts import describe_coverage, tokenizer_coverage
        from miniclip.classify.zero_shot import build_zero_shot_classifier, probabilities
        from miniclip.reports.confusion import classification_metrics, draw_confusion, format_classes, format_metrics
        from miniclip.retrieval import search
        from miniclip.utils.bad_samples import BadSamples

    given, templates = common.read_class_flags(options)
    images = find_images(options.images)
    classes, truth = choose_classes(given, [folder for _, folder in images], options.language, options.images)
    if len(classes) == 1:
        raise InputError("one class alone fits every image. Name more classes, or use miniclip moderate --ask")
    model, preprocess, tokenizer = common.open_model(options)
    names, bad_samples, start = list(classes), BadSamples(), time.perf_counter()
    classifier = build_zero_shot_classifier(model, tokenizer, list(classes.values()), templates)
    ready = time.perf_counter()
    rows = [(*image, row) for image, row in zip(images, truth or [None] * len(images))]
    rows, embeds = common.embed_usable(options, model, preprocess, rows, bad_samples)
    seconds = {"classes": ready - start, "pictures": time.perf_counter() - ready}
    found = search(classifier.T.numpy(), embeds, min(5, len(names)))[1]  # among equals the first
    results = []
    for (path, _, row), best, share in zip(rows, found, probabilities(model, embeds, classifier)):
        top = [(names[c], float(share[c])) for c in best]
        results.append({"image": path, "class": None if row is None else names[row], "top": top})
    coverage = tokenizer_coverage(tokenizer, list(classes.values()))
    about = {"model": str(options.model), "classes": classes, "templates": templates, "language": options.language,
             "precision": model.precision, "temperature": float(1 / model.logit_scale.exp()), "reading": coverage,
             "seconds": seconds}  # fmt: skip

    folder = Path(options.output_dir)
    if truth:
        about["metrics"], confusion = classification_metrics(found, np.array([row for *_, row in rows]), len(names))
        about["confusion"] = confusion.tolist()
        folders = {row: name for (_, name), row in zip(images, truth)}
        calls = [(name, words, folders.get(row, "")) for row, (name, words) in enumerate(classes.items())]
        # What the chart's font can draw: the name of a class, its words or its folder.
        labels = [next((t for t in call if t and t.isprintable() and max(t) < "\u0250"), "?") for call in calls]
        percent = format_metrics(about["metrics"], len(names))
        draw_confusion(folder / "confusion.png", confusion, labels, f"{options.model}: {percent}")
        table = f"{format_classes(names, confusion)}\n\n{percent}"
    else:
        table = format_images(results)
        if why := why_no_truth(options.images, images):
            table += f"\n\nno accuracy: {printable(why)}"
        (folder / "confusion.png").unlink(missing_ok=True)  # an earlier run's
    said = [table]
    if options.language != "en":
        said.append(f"class names in {options.language!r}: {describe_coverage(coverage)}. These numbers do not tell"
                    " whether the tower learned the language: measure it")  # fmt: skip
    if tokenizer.truncated:
        said.append(f"{tokenizer.truncated} sentences were truncated to {tokenizer.context_length} tokens")
    said += [f"{len(names)} classes in {seconds['classes']:.1f} s, {len(rows)} images in {seconds['pictures']:.1f} s"]
    chart = ["confusion.png"] * bool(truth)
    common.finish(options, "zero_shot", {**about, "pictures": results}, table, bad_samples, "\n".join(said), *chart)
