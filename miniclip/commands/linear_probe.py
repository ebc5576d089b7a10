"""The command `linear_probe`: logistic regression on image embeddings, compared with zero-shot."""

import argparse
import os
from pathlib import Path

from miniclip.classify.images import choose_classes, find_images
from miniclip.classify.prompts import TEMPLATES, read_classes, read_templates
from miniclip.commands.common import common_options, embed_usable, finish, open_model
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip linear_probe", description="Classifies by logistic regression on image embeddings."
    )
    parser.add_argument("--train", required=True, help="examples: a folder of class folders")
    parser.add_argument(
        "--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of examples per class to try"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of random draws; the mean is reported")
    parser.add_argument("--classes", help="words of the classes, for zero-shot (default: the folders' names)")
    parser.add_argument("--templates", help="a file of sentences with {} for the class name")
    parser.add_argument("--language", default="en", choices=list(TEMPLATES), help="of classes and templates")
    common_options(parser, "linear_probe")
    options = parser.parse_args(argv)
    if min(options.shots) < 1 or options.seeds < 1:
        raise InputError("--shots and --seeds must be at least 1")
    given = read_classes(options.classes, options.language) if options.classes is not None else None
    examples, images = find_images([options.train]), find_images(options.images)
    classes, labels = choose_classes(given, [folder for _, folder in examples], options.language)
    _, truth = choose_classes(classes, [folder for _, folder in images], options.language)
    for what, found in (("--train", labels), ("--images", truth)):
        if found is None:
            raise InputError(f"{what}: expected a folder with one folder for each of the classes {', '.join(classes)}")
    both = {os.path.realpath(path) for path, _ in examples} & {os.path.realpath(path) for path, _ in images}
    if both:
        raise InputError(f"{len(both)} images are in both --train and --images, so they are not held out: {min(both)}")

    import numpy as np
    import torch

    from miniclip.classify.linear_probe import draw_shots, probe
    from miniclip.classify.zero_shot import build_zero_shot_classifier
    from miniclip.reports.confusion import classification_metrics
    from miniclip.utils.bad_samples import BadSamples
    from miniclip.utils.files import replacing

    model, preprocess, tokenizer = open_model(options)
    bad_samples, n = BadSamples(), len(classes)
    templates = read_templates(options.templates) if options.templates else TEMPLATES[options.language]
    start = build_zero_shot_classifier(model, tokenizer, list(classes.values()), templates)
    rows = [(path, row) for (path, _), row in zip(examples, labels)]
    rows, features = embed_usable(options, model, preprocess, rows, bad_samples)
    labels = np.array([row for _, row in rows])
    if missing := [name for row, name in enumerate(classes) if row not in labels]:
        raise InputError(f"--train {options.train}: no example of {missing[0]!r} can be used")
    rows = [(path, row) for (path, _), row in zip(images, truth)]
    rows, held_out = embed_usable(options, model, preprocess, rows, bad_samples)
    truth, scale = np.array([row for _, row in rows]), model.logit_scale.exp().item()

    def measure(weight, bias=0.0) -> dict[str, float]:
        scores = scale * torch.from_numpy(held_out).double() @ weight.double() + bias
        order = scores.argsort(dim=1, descending=True, stable=True).numpy()
        return classification_metrics(order, truth, n)[0]

    found = [{"shots": 0, "start": "zero-shot", **measure(start)}]
    for shots in options.shots:
        for name, begin in (("nothing", None), ("zero-shot", start)):
            each = []
            for seed in range(options.seeds):
                chosen = draw_shots(labels, shots, seed)
                weight, bias, strength = probe(features[chosen], labels[chosen], n, begin, scale)
                each.append(measure(weight, bias))
            mean = {metric: float(np.mean([one[metric] for one in each])) for metric in each[0]}
            found.append({"shots": shots, "start": name, **mean})
    lines = ["| examples per class | starting from | top1 | mean per class recall |", "|---|---|---|---|"]
    for entry in found:
        shares = f"{100 * entry['top1']:.1f} | {100 * entry['mean_per_class_recall']:.1f}"
        lines.append(f"| {entry['shots'] or '0: zero-shot itself'} | {entry['start']} | {shares} |")
    weight, bias, strength = probe(features, labels, n, start, scale)
    with replacing(Path(options.output_dir) / "probe.npz") as scratch:  # the one to use, of all examples
        np.savez(scratch, weight=scale * weight, bias=bias, classes=list(classes))
    about = {"model": str(options.model), "classes": classes, "examples": len(labels), "pictures": len(truth)}
    about |= {"strength": strength, "all_examples": measure(weight, bias)}
    print("\n".join(lines))
    summary = f"all {len(labels)} examples, starting from zero-shot: top1 {100 * about['all_examples']['top1']:.1f}"
    finish(options, "linear_probe", {**about, "found": found}, "\n".join(lines), bad_samples, summary, "probe.npz")
