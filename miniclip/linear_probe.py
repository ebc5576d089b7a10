"""Fine-tune or zero-shot? With a few examples of each class, something between: a linear probe.

The model stays as it is and its image embeddings are classified by logistic regression (CLIP: Radford et al., arXiv
2103.00020, section 3.2), which takes seconds and forgets nothing. Here it may start from the zero-shot classifier and
is then held near to that, so that few examples do little harm and much good (cf. Silva-Rodriguez et al., arXiv
2312.12730; figures: docs/zero_shot.md):

    python -m miniclip.linear_probe --model runs/mine --train labelled --images others --shots 1 4 16

Both are folders with a folder for each class. The table has zero-shot and both probes beside one another.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from miniclip.config import InputError
from miniclip.options import run
from miniclip.prompts import TEMPLATES, read_classes, read_templates
from miniclip.zero_shot import (
    build_zero_shot_classifier,
    choose_classes,
    common_options,
    embed_pictures,
    find_pictures,
    open_model,
)

STRENGTHS = [10.0**power for power in range(-4, 3)]  # of the penalty, of which cross-validation takes one


def fit(features, labels, num_classes: int, strength: float, start=None, scale: float = 100.0):
    """Logistic regression: `(weight (E, C), bias (C,))`, both float64, the minimum of

        mean cross-entropy(scale * features @ weight + bias, labels) + strength / 2 * |weight - start|^2

    for features (N, E) of unit length and labels (N,), by L-BFGS to convergence. `start` (E, C) is 0 unless given, or
    the zero-shot classifier: without any example, or with an endless strength, that is what comes out. `scale` is the
    inverse of the model's temperature. The bias is not held back.
    """
    import torch
    import torch.nn.functional as F

    features, labels = torch.as_tensor(features, dtype=torch.float64), torch.as_tensor(labels)
    start = torch.zeros(features.shape[1], num_classes) if start is None else start
    start = start.to(torch.float64)
    moved = torch.zeros_like(start, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [moved, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-11, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(scale * features @ (start + moved) + bias, labels)
        value = value + strength / 2 * moved.square().sum()
        value.backward()
        return value

    threads = torch.get_num_threads()
    torch.set_num_threads(1 if features.numel() < 1 << 22 else threads)  # on little work they wait for one another
    try:
        solver.step(loss)
    finally:
        torch.set_num_threads(threads)
    return (start + moved).detach(), bias.detach()


def choose_strength(features, labels, num_classes: int, start=None, scale: float = 100.0, folds: int = 4) -> float:
    """The strength of STRENGTHS with the lowest cross-entropy on examples that were left out, in turn every fourth of
    each class; of equal ones the highest. With one example of a class there is nothing to leave out: the highest."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    labels, turn = np.asarray(labels), np.empty(len(labels), dtype=np.int64)
    for row in np.unique(labels):
        turn[labels == row] = np.arange((labels == row).sum())
    folds = min(folds, int(np.bincount(labels, minlength=num_classes).min()))
    if folds < 2:
        return STRENGTHS[-1]
    losses = []
    for strength in STRENGTHS:
        total = 0.0
        for fold in range(folds):
            out = turn % folds == fold
            weight, bias = fit(features[~out], labels[~out], num_classes, strength, start, scale)
            logits = scale * torch.as_tensor(features[out], dtype=torch.float64) @ weight + bias
            total += F.cross_entropy(logits, torch.as_tensor(labels[out]), reduction="sum").item()
        losses.append(total)
    return max(zip(losses, STRENGTHS), key=lambda pair: (-pair[0], pair[1]))[1]


def draw_shots(labels, shots: int, seed: int):
    """The rows of `shots` examples of each class, drawn by a seed; of a class with fewer, all."""
    import numpy as np

    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    rows = [rng.permutation(np.flatnonzero(labels == row))[:shots] for row in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def probe(features, labels, num_classes: int, start=None, scale: float = 100.0):
    """`fit` with the strength that cross-validation chooses: `(weight, bias, strength)`."""
    strength = choose_strength(features, labels, num_classes, start, scale)
    return *fit(features, labels, num_classes, strength, start, scale), strength


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip.linear_probe", description="Classifies by logistic regression on image embeddings."
    )
    parser.add_argument("--train", required=True, help="examples: a folder with a folder for each class")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="examples of a class, as many")
    parser.add_argument("--seeds", type=int, default=3, help="how often examples are drawn; the mean is said")
    parser.add_argument("--classes", help="words of the classes, for zero-shot; the folders' names unless given")
    parser.add_argument("--templates", help="a file of sentences with {} for the class name")
    parser.add_argument("--language", default="en", choices=list(TEMPLATES), help="of classes and templates")
    common_options(parser, "linear_probe")
    options = parser.parse_args(argv)
    if min(options.shots) < 1 or options.seeds < 1:
        raise InputError("--shots and --seeds are 1 or more")
    given = read_classes(options.classes, options.language) if options.classes is not None else None
    examples, pictures = find_pictures([options.train]), find_pictures(options.images)
    classes, labels = choose_classes(given, [folder for _, folder in examples], options.language)
    _, truth = choose_classes(classes, [folder for _, folder in pictures], options.language)
    for what, found in (("--train", labels), ("--images", truth)):
        if found is None:
            raise InputError(f"{what}: expected a folder with a folder for each of the classes {', '.join(classes)}")
    both = {os.path.realpath(path) for path, _ in examples} & {os.path.realpath(path) for path, _ in pictures}
    if both:
        raise InputError(f"{len(both)} pictures are both in --train and in --images: {min(both)}: not held out")

    import numpy as np
    import torch

    from miniclip.bad_samples import NAME, BadSamples
    from miniclip.confusion import classification_metrics
    from miniclip.files import replacing, write_json, write_text

    model, preprocess, tokenizer = open_model(options)
    bad_samples, n = BadSamples(), len(classes)
    templates = read_templates(options.templates) if options.templates else TEMPLATES[options.language]
    start = build_zero_shot_classifier(model, tokenizer, list(classes.values()), templates)
    rows = [(path, row) for (path, _), row in zip(examples, labels)]
    rows, features = embed_pictures(options, model, preprocess, rows, bad_samples)
    labels = np.array([row for _, row in rows])
    if missing := [name for row, name in enumerate(classes) if row not in labels]:
        raise InputError(f"--train {options.train}: there is no example of {missing[0]!r} that can be used")
    rows = [(path, row) for (path, _), row in zip(pictures, truth)]
    rows, held_out = embed_pictures(options, model, preprocess, rows, bad_samples)
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
    lines = ["| examples of a class | starting from | top1 | mean per class recall |", "|---|---|---|---|"]
    for entry in found:
        shares = f"{100 * entry['top1']:.1f} | {100 * entry['mean_per_class_recall']:.1f}"
        lines.append(f"| {entry['shots'] or '0: zero-shot itself'} | {entry['start']} | {shares} |")
    folder = Path(options.output_dir)
    weight, bias, strength = probe(features, labels, n, start, scale)
    with replacing(folder / "probe.npz") as scratch:  # of all examples: what one would use
        np.savez(scratch, weight=scale * weight, bias=bias, classes=list(classes))
    about = {"model": str(options.model), "classes": classes, "examples": len(labels), "pictures": len(truth)}
    about |= {"strength": strength, "all_examples": measure(weight, bias)}
    write_json(folder / "linear_probe.json", {**about, "found": found})
    write_text(folder / "linear_probe.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    everything = f"all {len(labels)} examples, starting from zero-shot: top1 {100 * about['all_examples']['top1']:.1f}"
    print(f"{everything}. Written: linear_probe.json, linear_probe.md, probe.npz in {folder}")
    bad_samples.open(folder / NAME)
    if bad_samples:
        print(f"{len(bad_samples)} bad samples were left out: {bad_samples.path}")


if __name__ == "__main__":
    run(main)
