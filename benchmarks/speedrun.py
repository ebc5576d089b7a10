"""A record to beat: how soon does a model find Flickr8k's images by their captions with a mean recall of 45?

    python benchmarks/speedrun.py --data data/flickr8k

Mean recall is the mean of R@1, R@5 and R@10, text to image, over the 1,000 validation images and all of their 5,000
captions. What counts is the wall time of one process that begins with nothing but the installed packages and the data
set: starting Python, importing, loading the encoders, reading and decoding, the features of pictures and captions, the
projections, and writing the model. Its folder is then measured by evaluate.py, whose time does not count, as the
packages' installation does not. Settings: recipes/speedrun.json. Each seed draws its own training images, captions and
batches, and all of them have to reach the target. Prints a row for docs/records.md; ends with 1 if one did not.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]


def make(recipe: dict, data: Path, output: Path, seed: int):
    """Trains a model on the training images and writes it."""
    import numpy as np
    import torch

    from miniclip.config import MiniClipConfig
    from miniclip.datasets.read import read_captions
    from miniclip.inference.embed import embed_images, embed_texts
    from miniclip.inference.fast import inference_copy
    from miniclip.loss import clip_loss
    from miniclip.model import MiniClip
    from miniclip.training.closed_form import ClosedForm, Moments, Pairs, install, train
    from miniclip.transforms import Preprocess
    from miniclip.utils.machine import CORES

    torch.manual_seed(seed)
    draw = random.Random(seed)
    records = draw.sample(read_captions(data / "en_train.json", check_images=False), recipe["images"])
    paths = [record["image"] for record in records]
    texts = [text for record in records for text in draw.sample(record["caption"], recipe["captions"])]

    values = MiniClipConfig.from_name(recipe["model"]).to_dict()
    values.pop("preprocess_cfg")
    values["vision_cfg"]["image_size"] = recipe["image_size"]
    model = MiniClip(MiniClipConfig.from_dict(values)).eval()
    model.visual.load_pretrained()
    model.text.load_pretrained()
    layers = recipe["text_layers"]  # the first ones of the encoder
    del model.text.trunk.encoder.layer[layers:]
    model.text.trunk.config.num_hidden_layers = model.config.text_cfg.hf_model_config["num_hidden_layers"] = layers
    preprocess, tokenizer = Preprocess(model.config.preprocess_cfg), model.text.tokenizer

    # Features, each core at another part of the work
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = inference_copy(model.to(device), recipe["precision"])
    torch.set_num_threads(1)
    text_parts, image_parts = ([items[i : i + 500] for i in range(0, len(items), 500)] for items in (texts, paths))
    with ThreadPoolExecutor(CORES) as pool:
        captions = pool.map(partial(embed_texts, fast, tokenizer, batch_size=128, project=False), text_parts)
        images = pool.map(partial(embed_images, fast, preprocess, num_workers=0, project=False), image_parts)
        images, captions = (torch.from_numpy(np.concatenate(list(parts))) for parts in (images, captions))
    torch.set_num_threads(CORES)

    # Projections: in closed form, then trained
    heads = [model.cpu().visual.projection, model.text.projection]
    pairs = Pairs(images, captions, torch.arange(len(images) + 1) * recipe["captions"])
    form = ClosedForm(Moments.of(pairs), bias=False)
    install(heads, form.solve(*recipe["regularisation"], model.config.embed_dim))
    args = SimpleNamespace(
        **{name: recipe[name] for name in ("num_train_epochs", "train_batch_size", "learning_rate")}, seed=seed,
        world_size=1, gradient_accumulation_steps=1, max_steps=0, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.98,
        adam_epsilon=1e-6, lr_scheduler_type="cosine", lr_scheduler_kwargs=None, max_grad_norm=1.0,
        get_warmup_steps=lambda steps: steps // 20,
    )  # fmt: skip
    scale = torch.nn.Parameter(torch.tensor(math.log(20)))
    train(heads, [scale], pairs, args, lambda outputs, _: clip_loss(*outputs[:3]))
    model.save_pretrained(output)


def run(*argv):
    subprocess.run([sys.executable, *map(str, argv)], check=True, stdout=subprocess.DEVNULL)


def measure(recipe: Path, data: Path, seed: int, scratch: Path) -> tuple[float, float]:
    """The seconds that a model took to make, and its mean recall, text to image, in percent."""
    folder = scratch / f"seed-{seed}"
    start = time.perf_counter()
    run(__file__, "--data", data, "--recipe", recipe, "--seeds", seed, "--make", folder)
    seconds = time.perf_counter() - start
    result = folder / "found.json"
    run(ROOT / "evaluate.py", "--model", folder, "--eval_file", data / "en_val.json", "--output_file", result)
    metrics = json.loads(result.read_text())["metrics"]
    return seconds, 100 * sum(metrics[f"text_to_image_R@{k}"] for k in (1, 5, 10)) / 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with en_train.json and en_val.json")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "speedrun.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # the folder that this process writes
    options = parser.parse_args()
    recipe = json.loads(options.recipe.read_text())
    if options.make:
        return make(recipe, options.data, options.make, options.seeds[0])
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            found.append(measure(options.recipe, options.data, seed, Path(scratch)))
            print(f"seed {seed}: {found[-1][0]:.1f} s, mean recall {found[-1][1]:.2f}", flush=True)
    from results import machine

    seconds, recalls = sorted(s for s, _ in found), [r for _, r in found]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    print(
        f"| {date.today()} | {commit.strip() or '?'} | {seconds[len(seconds) // 2]:.1f} ({seconds[0]:.1f} to"
        f" {seconds[-1]:.1f}) | {min(recalls):.1f} to {max(recalls):.1f} | {machine()} |"
        f" `python benchmarks/speedrun.py --data data/flickr8k` |"
    )
    if min(recalls) < recipe["target"]:
        sys.exit(f"the lowest mean recall, {min(recalls):.2f}, misses the target of {recipe['target']}")


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: threads that wait for one another spin only briefly
    main()
