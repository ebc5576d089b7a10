"""What does freezing a tower save? Epochs that run it, against epochs on features that were computed once.

    python benchmarks/frozen.py

Trains with the real trainer on synthetic images (500 x 375): first as with any frozen part of a network, decoding and
encoding every image in every epoch, then by `miniclip.training.freeze`. Writes its part of RESULTS.md.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from inputs import make_inputs  # noqa: E402
from results import machine, write_section  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from miniclip.config import MiniClipConfig  # noqa: E402
from miniclip.datasets.read import read_captions  # noqa: E402
from miniclip.model import MiniClip  # noqa: E402
from miniclip.tokenizer import Tokenizer  # noqa: E402
from miniclip.training.arguments import RunArguments  # noqa: E402
from miniclip.training.dataset import RunDataset  # noqa: E402
from miniclip.training.freeze import freeze, freeze_towers  # noqa: E402
from miniclip.training.options import TrainOptions  # noqa: E402
from miniclip.training.trainer import RunTrainer  # noqa: E402
from miniclip.transforms import Preprocess  # noqa: E402

CASES = [  # model, freeze_image, freeze_text
    ("TinyCLIP-ViT-40M-32-Text-19M", "all", "none"),
    ("TinyCLIP-ViT-40M-32-Text-19M", "tower", "tower"),
    ("ViT-B-16", "all", "none"),
]


class Epochs(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_epoch_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_epoch_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def epochs(name: str, image: str, text: str, records: list[dict], features: bool, n: int) -> tuple[float, list[float]]:
    """Seconds before the first epoch, in which features are computed, and of each of n epochs."""
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_name(name))
    preprocess, tokenizer = Preprocess(model.config.preprocess_cfg), Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        args = RunArguments(
            folder, per_device_train_batch_size=64, num_train_epochs=n, save_strategy="no", disable_tqdm=True,
            learning_rate=1e-5, report_to="none",
        )  # fmt: skip
        start, timer = time.perf_counter(), Epochs()
        if features:
            options = TrainOptions(freeze_image=image, freeze_text=text, feature_cache=folder)
            dataset, _ = freeze_towers(model, options, args, records, preprocess, tokenizer)
            dataset = dataset(records, preprocess)
        else:
            freeze(model, image, text)
            dataset = RunDataset(records, preprocess)
        once = time.perf_counter() - start
        RunTrainer(model, args, dataset, preprocess=preprocess, tokenizer=tokenizer, callbacks=[timer]).train()
    return once, timer.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    images = parser.parse_args().images
    rows = [
        "| model | frozen | tower running, s an epoch | features once, s | epochs on them, s | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), 0, images, images)
        records = read_captions(Path(folder) / "eval.json", check_images=False)
        for name, image, text in CASES:
            _, running = epochs(name, image, text, records, False, 2)
            once, on_features = epochs(name, image, text, records, True, 4)
            plain, fast = min(running), sorted(on_features[1:])[1]
            frozen = ", ".join(f"{kind} {how}" for kind, how in (("image", image), ("text", text)) if how != "none")
            row = f"| {name} | {frozen} | {plain:.2f} | {once:.2f} | {fast:.3f} | {plain / fast:.1f} |"
            print(json.dumps({"running": running, "once": once, "on_features": on_features}), row, sep="\n", flush=True)
            rows.append(row)
    about = (
        f"{machine()}. `python benchmarks/frozen.py --images {images}`: {images} synthetic images of 500 x 375 with"
        " five captions each, batch 64, fp32; the faster of two epochs against the median of the second to the fourth."
    )
    write_section("locked", "\n".join(["## Frozen towers", "", about, "", *rows]))


if __name__ == "__main__":
    main()
