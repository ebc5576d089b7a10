"""What do faster convolutions save? Training steps of image towers with `training/convolutions.py` and without.

    pip install --no-deps -r requirements-encoders.txt
    python benchmarks/convolutions.py
    python benchmarks/convolutions.py --device cuda --batch 256

One step is the forward and backward pass of an image tower in bf16, on random pixels; both sides take turns. Writes
its part of RESULTS.md, of a GPU one of its own. Encoders whose packages are missing are left out.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from results import machine, write_section  # noqa: E402

from miniclip.config import MiniClipConfig  # noqa: E402
from miniclip.model import MiniClip  # noqa: E402
from miniclip.training.convolutions import convolution_wrappers  # noqa: E402
from miniclip.training.freeze import freeze  # noqa: E402
from miniclip.utils.errors import InputError  # noqa: E402
from miniclip.utils.machine import keep_freed_memory  # noqa: E402

TEXT = {"vocab_size": 1000, "width": 64, "heads": 1, "layers": 1}
CASES = {  # vision_cfg, what is frozen
    "EfficientNet-Lite0 and Lite2, 288 and 340 px, the last 8 blocks": (
        {"towers": [
            {"hf_model_name": "package:efficientnet-lite0", "image_size": 288},
            {"hf_model_name": "package:efficientnet-lite2", "image_size": 340},
        ]}, "all_but_8",
    ),
    "EfficientNet-Lite0, 224 px, the last 3 blocks": ({"hf_model_name": "package:efficientnet-lite0"}, "all_but_3"),
    "RN50, 224 px, the last 8 blocks": (
        {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}, "all_but_8",
    ),
    "ConvNeXt-Tiny of transformers, 224 px, all of it": (
        {"hf_model_config": {"model_type": "convnext"}, "image_size": 224}, "none",
    ),
}  # fmt: skip


def seconds(model: MiniClip, images: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16):
        embeds = model.encode_image(images)
    loss = embeds.float().square().sum()
    loss.backward()
    model.zero_grad()
    loss.item()  # which waits for a GPU
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="write here, not to RESULTS.md")
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    for name, (vision, frozen) in CASES.items():
        torch.manual_seed(0)
        try:
            model = MiniClip(MiniClipConfig.from_dict({"embed_dim": 64, "vision_cfg": vision, "text_cfg": TEXT}))
        except InputError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        freeze(model.to(args.device).train(), frozen)
        size = model.config.preprocess_cfg.size
        images = torch.randn(args.batch, 3, size, size, device=args.device)
        ways = (), convolution_wrappers(model.visual, size)
        times = [[], []]
        for turn in range(args.rounds + 1):
            for wrappers, found in zip(ways, times):
                model.visual.wrappers = wrappers
                found.append(seconds(model, images))
                print(f"{name}: round {turn} of {args.rounds}, {found[-1]:.3f} s", flush=True)
        plain, ours = (median(found[1:]) for found in times)  # the first of each warms up
        ratio = median(a / b for a, b in zip(*(found[1:] for found in times)))
        rows.append(f"| {name} | {plain:.3g} | {ours:.3g} | {ratio:.2f} |")
    device = "" if args.device == "cpu" else f" --device {args.device}"
    about = (
        f"{machine()}. `python benchmarks/convolutions.py{device} --batch {args.batch} --rounds {args.rounds}`: forward"
        f" and backward pass of an image tower in bf16, both sides in turns, medians of {args.rounds} rounds."
    )
    head = ["| what learns | torch, s a step | MiniCLIP, s a step | times as fast |", "|---|---|---|---|"]
    where = "" if args.device == "cpu" else f", {args.device}"
    text = "\n".join([f"## Convolutions that learn{where}", "", about, "", *head, *rows])
    write_section(f"convolutions{where}", text, args.results)


if __name__ == "__main__":
    main()
