"""What do OpenCLIP's losses give? Writes tests/data/loss_golden.json, which tests/training/test_losses.py reads.

    /path/to/peers/bin/python benchmarks/make_loss_golden.py     (benchmarks/peers.md makes that environment)

The inputs are drawn by NumPy, so that the test can draw the same; float64, so that what differs is the formula and not
the rounding. Of each gradient some numbers are kept.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from contestants import import_open_clip

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data" / "loss_golden.json"
ROWS, WIDTH, TEACHER_WIDTH = 12, 8, 6


def draw(seed: int, width: int) -> torch.Tensor:
    """Embeddings (ROWS, width), of unit length."""
    numbers = np.random.default_rng(seed).standard_normal((ROWS, width))
    return F.normalize(torch.from_numpy(numbers), dim=1)


def inputs() -> dict[str, torch.Tensor]:
    given = {"image": draw(0, WIDTH), "text": draw(1, WIDTH), "scale": torch.tensor(7.5, dtype=torch.float64)}
    given["bias"] = torch.tensor(-3.25, dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in given.items()}


def main():
    import_open_clip()
    from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

    teacher = draw(2, TEACHER_WIDTH), draw(3, TEACHER_WIDTH), torch.tensor(11.0, dtype=torch.float64)
    losses = {
        "clip": lambda image, text, scale, bias: ClipLoss()(image, text, scale),
        "siglip": lambda image, text, scale, bias: SigLipLoss()(image, text, scale, bias),
        "distill": lambda image, text, scale, bias: sum(DistillClipLoss()(image, text, scale, *teacher)),
        "affinity": lambda image, text, scale, bias: DistillClipLoss()(image, text, scale, *teacher)[1],
    }
    golden = {"open_clip": importlib.metadata.version("open_clip_torch")}
    for name, loss_of in losses.items():
        given = inputs()
        loss = loss_of(**given)
        loss.backward()
        golden[name] = {"loss": loss.item()} | {
            key: tensor.grad.flatten()[:24].tolist() for key, tensor in given.items() if tensor.grad is not None
        }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"written to {GOLDEN}")


if __name__ == "__main__":
    main()
