"""Linear probe: few-shot classification by logistic regression on image embeddings.

Reads labelled examples and held-out images, both in class folders, and writes linear_probe.json, linear_probe.md and
probe.npz to --output_dir."""

import os
from pathlib import Path

from miniclip.commands import common
from miniclip.utils.command_line import Parser, at_least, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("linear_probe", __doc__, "--model runs/mine --examples labelled --images held_out")
    parser.add_argument("--examples", required=True, help="labelled images to learn from: a folder of class folders")
    shots = "numbers of examples per class to try (default: 1 2 4 8 16)"
    parser.add_argument("--shots", type=at_least(1), nargs="+", default=[1, 2, 4, 8, 16], help=shots)
    parser.add_argument("--seeds", type=at_least(1), default=3, help="number of random draws; the mean is reported")
    common.share_class_flags(parser)
    common.share_image_flags(parser, "linear_probe")
    options = parser.parse_args(argv)
    with starting():
        import numpy as np
        import torch

        from miniclip.classify.images import choose_classes, find_images
        from miniclip.classify.linear_probe import draw_shots, probe
        from miniclip.classify.zero_shot import build_zero_shot_classifier
        from miniclip.reports.confusion import classification_metrics
        from miniclip.utils.bad_samples import BadSamples
        from miniclip.utils.files import replacing

    given, templates = common.read_class_flags(options)
    examples, images = find_images([options.examples]), find_images(options.images)
    classes, labels = choose_classes(given, [folder for _, folder in examples], options.language, [options.examples])
    _, truth = choose_classes(classes, [folder for _, folder in images], options.language)
    for what, found in (("--examples", labels), ("--images", truth)):
        if found is None:
            raise InputError(f"{what}: expected a folder with one folder for each of the classes {', '.join(classes)}")
    if both := {os.path.realpath(path) for path, _ in examples} & {os.path.realpath(path) for path, _ in images}:
        raise InputError(f"{len(both)} images are both in --examples and in --images, such as {min(both)}")
    model, preprocess, tokenizer = common.open_model(options)
    bad_samples, n = BadSamples(), len(classes)
    start = build_zero_shot_classifier(model, tokenizer, list(classes.values()), templates)

    def embed(images: list, labels: list):
        rows = [(path, label) for (path, _), label in zip(images, labels)]
        rows, embeds = common.embed_usable(options, model, preprocess, rows, bad_samples)
        return embeds, np.array([label for _, label in rows])

    features, labels = embed(examples, labels)
    if missing := [name for row, name in enumerate(classes) if row not in labels]:
        raise InputError(f"--examples {options.examples}: no usable example of {missing[0]!r}")
    (held_out, truth), scale = embed(images, truth), model.logit_scale.exp().item()

    def measure(weight, bias=0.0) -> dict[str, float]:
        scores = scale * torch.from_numpy(held_out).double() @ weight.double() + bias
        return classification_metrics(scores.argsort(dim=1, descending=True, stable=True).numpy(), truth, n)[0]

    found = [{"shots": 0, "start": "zero-shot", **measure(start)}]
    for shots in options.shots:
        for name, begin in (("nothing", None), ("zero-shot", start)):
            draws = [draw_shots(labels, shots, seed) for seed in range(options.seeds)]
            each = [measure(*probe(features[rows], labels[rows], n, begin, scale)[:2]) for rows in draws]
            mean = {metric: float(np.mean([one[metric] for one in each])) for metric in each[0]}
            found.append({"shots": shots, "start": name, **mean})
    table = "| examples per class | starting from | top1 | mean per class recall |\n|---|---|---|---|"
    for entry in found:
        shares = f"{100 * entry['top1']:.1f} | {100 * entry['mean_per_class_recall']:.1f}"
        table += f"\n| {entry['shots'] or '0: zero-shot itself'} | {entry['start']} | {shares} |"
    weight, bias, strength = probe(features, labels, n, start, scale)
    with replacing(Path(options.output_dir) / "probe.npz") as scratch:  # the one to use, of all examples
        np.savez(scratch, weight=scale * weight, bias=bias, classes=list(classes))
    about = {"model": str(options.model), "classes": classes, "examples": len(labels), "pictures": len(truth)}
    about |= {"strength": strength, "all_examples": measure(weight, bias)}
    summary = f"{table}\nall {len(labels)} examples, from zero-shot: top1 {100 * about['all_examples']['top1']:.1f}"
    common.finish(options, "linear_probe", {**about, "found": found}, table, bad_samples, summary, "probe.npz")
