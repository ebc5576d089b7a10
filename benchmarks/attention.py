"""What does attention written out save on a CPU? Towers with fast.py's attention and with torch's.

    python benchmarks/attention.py

Embeddings of images in bf16 and training steps (both passes of both towers) on random inputs; the two sides take
turns. Writes its part of RESULTS.md.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from inputs import make_captions  # noqa: E402
from results import machine, section, write_section  # noqa: E402

import miniclip  # noqa: E402
from miniclip.inference import fast  # noqa: E402
from miniclip.inference.matmul import fast_arithmetic  # noqa: E402
from miniclip.training.grad_cache import wrap_towers  # noqa: E402
from miniclip.utils.machine import keep_freed_memory  # noqa: E402

SIDES = {"torch": F.scaled_dot_product_attention, "MiniCLIP": fast._attention}
MODELS = {"TinyCLIP-ViT-40M-32-Text-19M": 32, "ViT-B-16": 16}  # and the images of a batch


def step(model: miniclip.MiniClip, pixel_values: torch.Tensor, input_ids: torch.Tensor, precision: str):
    with fast_arithmetic("cpu"):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            embeds = model.encode_image(pixel_values, True), model.encode_text(input_ids, True)
        miniclip.clip_loss(*(x.float() for x in embeds), model.logit_scale).backward()
    model.zero_grad()


def cases(name: str, images: int):
    """Yields what is measured with a model: in words, and a function that does it once."""
    torch.manual_seed(0)
    model, _, tokenizer = miniclip.load(name)
    side = model.visual.image_size
    pixel_values, input_ids = torch.randn(images, 3, side, side), tokenizer(make_captions(images))
    copy = fast.inference_copy(model, "bf16")
    yield f"{images} images, bf16", partial(copy.encode_image, pixel_values)
    wrap_towers(model.train())
    for precision in ("fp32", "bf16"):
        yield f"step of {images} pairs, {precision}", partial(step, model, pixel_values, input_ids, precision)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of configs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, help="write here, not to RESULTS.md")
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for name in options.models:
        for what, work in cases(name, MODELS.get(name, 16)):
            times = {side: [] for side in SIDES}
            for _ in range(options.rounds + 1):
                for side, attention in SIDES.items():
                    fast._attention, start = attention, time.perf_counter()
                    work()
                    times[side].append(time.perf_counter() - start)
            both = zip(*(found[1:] for found in times.values()))  # the first of each warms up
            ratio = median(a / b for a, b in both)
            milliseconds = [f"{1e3 * median(found[1:]):.0f}" for found in times.values()]
            rows.append(f"| {' | '.join([name, what, *milliseconds, f'{ratio:.2f}'])} |")
            print(rows[-1], flush=True)
    fast._attention = SIDES["MiniCLIP"]
    about = (
        f"{machine()}. `python benchmarks/attention.py`: the two sides in turns, medians of {options.rounds} rounds;"
        " everything but attention is the same."
    )
    head = ["| model | what | torch's, ms | MiniCLIP's, ms | times as fast |", "|---|---|---|---|---|"]
    name = section("attention", parser, options, "models")
    write_section(name, "\n".join(["## Attention on the CPU", "", about, "", *head, *rows]), options.results)


if __name__ == "__main__":
    main()
