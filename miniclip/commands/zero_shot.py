"""Zero-shot classification: which of several classes an image shows, from the class names alone.

Reads images and class names, and writes zero_shot.json and zero_shot.md to --output_dir; for images in class folders
also the accuracy and confusion.png.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from miniclip.commands import common
from miniclip.utils.command_line import Parser, printable
from miniclip.utils.errors import InputError


def format_pictures(pictures: list[dict], most: int = 20) -> str:
    """The first pictures as a Markdown table: the three best classes, with their probabilities in percent."""
    rows = ["| picture | class | then |", "|---|---|---|"]
    for picture in pictures[:most]:
        first, *others = [f"{name} {100 * share:.1f}" for name, share in picture["top"][:3]]
        rows.append(f"| {common.cell(picture['image'])} | {first} | {', '.join(others)} |")
    return "\n".join(rows + [f"| and {len(pictures) - most} more | | |"] * (len(pictures) > most))


def drawable(classes: dict[str, str], folders: Sequence[str]) -> list[str]:
    """Names that the picture's font has letters for: a class's name, its words or its folder."""
    rows = zip(classes, classes.values(), folders)
    return [next((text for text in row if text and text.isprintable() and max(text) < "\u0250"), "?") for row in rows]


def why_no_truth(paths: Sequence[str], pictures: list[tuple[str, str | None]]) -> str | None:
    """Why it cannot be told how many are right, where one may have thought so. `paths`: those that were named."""
    loose = [path for path, folder in pictures if folder is None]
    if len(loose) < len(pictures):
        return f"{loose[0]} lies in no folder of a class" if loose else "the folders are none of the classes"
    for top in filter(os.path.isdir, paths):
        if len({os.path.dirname(path) for path in loose if path.startswith(os.path.join(top, ""))}) > 1:
            return f"{top} has pictures beside its folders, which are then no classes"
    return None


def main(argv: list[str]):
    parser = Parser.command("zero_shot", __doc__, '--model runs/mine --images photos --classes "dog,cat,horse"')
    common.share_class_flags(parser)
    common.share_image_flags(parser, "zero_shot")
    options = parser.parse_args(argv)

    from miniclip.classify.pictures import choose_classes, embed_pictures, find_pictures
    from miniclip.classify.prompts import describe_legibility, legibility
    from miniclip.classify.zero_shot import build_zero_shot_classifier, probabilities

    given, templates = common.read_class_flags(options)
    pictures = find_pictures(options.images)
    classes, truth = choose_classes(given, [folder for _, folder in pictures], options.language)
    if len(classes) == 1:
        raise InputError("one class alone fits every image. Name more classes, or use miniclip moderate --ask")

    import numpy as np

    from miniclip.reports.confusion import classification_metrics, draw_confusion, format_classes, format_metrics
    from miniclip.retrieval import search
    from miniclip.utils.bad_samples import NAME, BadSamples
    from miniclip.utils.files import write_json, write_text

    model, preprocess, tokenizer = common.open_model(options)
    names, bad_samples, start = list(classes), BadSamples(), time.perf_counter()
    classifier = build_zero_shot_classifier(model, tokenizer, list(classes.values()), templates)
    ready = time.perf_counter()
    rows = [(*picture, row) for picture, row in zip(pictures, truth or [None] * len(pictures))]
    rows, embeds = embed_pictures(options, model, preprocess, rows, bad_samples)
    seconds = {"classes": ready - start, "pictures": time.perf_counter() - ready}
    shares = probabilities(model, embeds, classifier)
    found = search(classifier.T.numpy(), embeds, min(5, len(names)))[1]  # of equal ones the first, as everywhere
    results = [
        {"image": path, "class": None if row is None else names[row],
         "top": [(names[c], float(share[c])) for c in best]}
        for (path, _, row), best, share in zip(rows, found, shares)
    ]  # fmt: skip
    reading = legibility(tokenizer, list(classes.values()))
    about = {"model": str(options.model), "classes": classes, "templates": templates, "language": options.language,
             "temperature": float(1 / model.logit_scale.exp()), "reading": reading, "seconds": seconds}  # fmt: skip

    folder = Path(options.output_dir)
    written = ["zero_shot.json", "zero_shot.md"] + ["confusion.png"] * bool(truth)
    if truth:
        right = np.array([row for *_, row in rows])
        about["metrics"], confusion = classification_metrics(found, right, len(names))
        about["confusion"] = confusion.tolist()
        table = format_classes(names, confusion)
        folders = {row: name for (_, name), row in zip(pictures, truth)}
        labels = drawable(classes, [folders.get(row, "") for row in range(len(names))])
        percent = format_metrics(about["metrics"], len(names))
        draw_confusion(folder / "confusion.png", confusion, labels, f"{options.model}: {percent}")
        table += f"\n\n{percent}"
    else:
        table = format_pictures(results)
        if why := why_no_truth(options.images, pictures):
            table += f"\n\nno accuracy: {printable(why)}"
        (folder / "confusion.png").unlink(missing_ok=True)  # an earlier run's
    write_json(folder / "zero_shot.json", {**about, "pictures": results})
    write_text(folder / "zero_shot.md", table + "\n")
    print(table)
    if options.language != "en":
        told = f"{describe_legibility(reading)}. Whether the tower learned the language, they do not tell: measure it"
        print(f"the class names in {options.language!r}: {told}")
    if tokenizer.truncated:
        print(f"{tokenizer.truncated} sentences were cut off at {tokenizer.context_length} tokens")
    speed = [f"{n} {kind} in {seconds[kind]:.1f} s" for kind, n in (("classes", len(names)), ("pictures", len(rows)))]
    print(f"{', '.join(speed)}. Written: {', '.join(written)} in {folder}")
    common.report_bad_samples(bad_samples, folder / NAME)
