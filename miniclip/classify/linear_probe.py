"""Linear probe: logistic regression on frozen image embeddings, from scratch or from the zero-shot classifier.

Sources: CLIP (Radford et al., arXiv 2103.00020, section 3.2); staying near the zero-shot classifier, which loses little
with few examples: cf. Silva-Rodriguez et al., arXiv 2312.12730. Numbers: docs/classify.md."""

import numpy as np
import torch
import torch.nn.functional as F

STRENGTHS = [10.0**power for power in range(-4, 3)]  # of the penalty; cross-validation chooses one


def fit(features, labels, num_classes: int, strength: float, start=None, scale: float = 100.0):
    """Logistic regression by L-BFGS to convergence. Returns `(weight (E, C), bias (C,))`, float64, the minimum of

        mean cross-entropy(scale * features @ weight + bias, labels) + strength / 2 * |weight - start|^2

    for features (N, E) of unit length and labels (N,). `start` (E, C) is 0 or the zero-shot classifier, `scale` the
    inverse of the model's temperature."""
    features, labels = torch.as_tensor(features, dtype=torch.float64), torch.as_tensor(labels)
    start = features.new_zeros(features.shape[1], num_classes) if start is None else start.double()
    moved, bias = torch.zeros_like(start, requires_grad=True), start.new_zeros(num_classes, requires_grad=True)
    limits = {"max_iter": 500, "tolerance_grad": 1e-7, "tolerance_change": 1e-11}
    solver = torch.optim.LBFGS([moved, bias], line_search_fn="strong_wolfe", **limits)

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(scale * features @ (start + moved) + bias, labels) + strength / 2 * moved.square().sum()
        value.backward()
        return value

    threads = torch.get_num_threads()
    if features.numel() < 1 << 22:
        torch.set_num_threads(1)  # on small problems threads only wait for one another
    try:
        solver.step(loss)
    finally:
        torch.set_num_threads(threads)
    return (start + moved).detach(), bias.detach()


def choose_strength(features, labels, num_classes: int, start=None, scale: float = 100.0) -> float:
    """Returns the strength with the lowest cross-entropy on held-out examples, in turn every fourth of each class;
    among equals the highest, as with one example of a class, where none can be held out."""
    labels, turn = np.asarray(labels), np.empty(len(labels), dtype=np.int64)
    for row in np.unique(labels):
        turn[labels == row] = np.arange((labels == row).sum())
    if (folds := min(4, int(np.bincount(labels, minlength=num_classes).min()))) < 2:
        return STRENGTHS[-1]
    losses = dict.fromkeys(STRENGTHS, 0.0)
    for fold in range(folds):
        out = turn % folds == fold
        for strength in STRENGTHS:
            weight, bias = fit(features[~out], labels[~out], num_classes, strength, start, scale)
            logits = scale * torch.as_tensor(features[out], dtype=torch.float64) @ weight + bias
            losses[strength] += F.cross_entropy(logits, torch.as_tensor(labels[out]), reduction="sum").item()
    return min(STRENGTHS, key=lambda strength: (losses[strength], -strength))


def draw_shots(labels, shots: int, seed: int):
    """Returns the rows of `shots` random examples of each class, or of all if it has fewer."""
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    rows = [rng.permutation(np.flatnonzero(labels == row))[:shots] for row in np.unique(labels)]
    return np.sort(np.concatenate(rows))


def probe(features, labels, num_classes: int, start=None, scale: float = 100.0):
    """Fits with the strength that cross-validation chooses. Returns `(weight, bias, strength)`."""
    strength = choose_strength(features, labels, num_classes, start, scale)
    return *fit(features, labels, num_classes, strength, start, scale), strength
