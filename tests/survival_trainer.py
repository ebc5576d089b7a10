"""A trainer of a tiny model on pictures that it makes, for tests that kill it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from miniclip.config import MiniClipConfig, PreprocessConfig
from miniclip.model import MiniClip
from miniclip.tokenizer import Tokenizer
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.trainer import RunTrainer
from miniclip.transforms import Preprocess


def make_trainer(out: Path, steps: int = 2, batch: int = 4, width: int = 32, n: int = 8, **arguments) -> RunTrainer:
    """It saves after every step, and keeps two checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    records = []
    for i in range(n):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(out / f"{i}.png")
        records.append({"image": str(out / f"{i}.png"), "caption": [f"picture number {i}"]})
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict({
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": width, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
    }))  # fmt: skip
    args = RunArguments(**{
        "output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": batch, "save_strategy": "steps",
        "save_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1,
        "dataloader_num_workers": 0, **arguments,
    })  # fmt: skip
    preprocess = Preprocess(PreprocessConfig(size=32))
    return RunTrainer(model, args, RunDataset(records, preprocess), preprocess=preprocess, tokenizer=Tokenizer(16))
