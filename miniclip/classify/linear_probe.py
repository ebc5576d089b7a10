"""Fine-tune or zero-shot? With a few examples of each class, something between: a linear probe.

The model stays as it is and its image embeddings are classified by logistic regression (CLIP: Radford et al., arXiv
2103.00020, section 3.2), which takes seconds and forgets nothing. Here it may start from the zero-shot classifier and
is then held near to that, so that few examples do little harm and much good (cf. Silva-Rodriguez et al., arXiv
2312.12730; figures: docs/classify.md):

    python -m miniclip linear_probe --model runs/mine --train labelled --images others --shots 1 4 16

Both are folders with a folder for each class. The table has zero-shot and both probes beside one another.
"""

from __future__ import annotations

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
