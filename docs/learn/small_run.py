"""Training runs of a few seconds, for the experiments of the chapters: data, model, training loop and recall.

The scenes of `miniclip shapes` at 32 pixels, and a CLIP of 180,000 parameters. `fit` is what `ClipTrainer` does for you
(miniclip/trainer.py), written out.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from miniclip import ClipTrainer, MiniClip, MiniClipConfig, Tokenizer, retrieval_metrics
from miniclip.datasets import shapes
from miniclip.loss import clip_loss
from miniclip.model import MAX_LOGIT_SCALE
from miniclip.transforms import to_levels


class Data(NamedTuple):
    """Images (N, 3, 32, 32) and the ids of their captions (N, 5, L), to train on and held out; `words` (V,) are the
    tokenizer's ids that occur in them."""

    images: Tensor
    ids: Tensor
    held_out_images: Tensor
    held_out_ids: Tensor
    words: Tensor


def make_data(train: int = 1500, held_out: int = 200, describe=shapes.captions) -> Data:
    """Draws scenes, described by `describe(scene, rng)` in always as many captions. No pair of kinds is in both."""
    images, captions = [], []
    for split, number in (("train", train), ("eval", held_out)):
        for scene, image, rng in shapes.drawn(split, number, size=32):
            images.append(to_levels(image))
            captions += describe(scene, rng)
    # Of CLIP's 49,408 tokens fewer than a hundred occur. Numbered anew, in their order, they need a small table only,
    # and the end token still has the highest id.
    words, ids = Tokenizer(77)(captions, trim=True).unique(return_inverse=True)
    pixels, ids = torch.stack(images).float() / 127.5 - 1, ids.view(train + held_out, -1, ids.shape[1])
    return Data(pixels[:train], ids[:train], pixels[train:], ids[train:], words)


def make_model(data: Data, seed: int = 0, width: int = 64, **fields) -> MiniClip:
    """A small CLIP with random weights; `fields` are those of MiniClipConfig."""
    torch.manual_seed(seed)
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": width, "head_width": 16}
    text = {"context_length": data.ids.shape[2], "vocab_size": len(data.words), "width": width, "heads": 4, "layers": 1}
    return MiniClip(MiniClipConfig.from_dict({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, **fields}))


def fit(model: MiniClip, data: Data, loss=None, steps: int = 150, batch: int = 64, lr: float = 3e-3, seed: int = 0):
    """Trains `model` on the first two fields of `data`; `loss(outputs, images, ids)`, CLIP's unless given. Returns it,
    in evaluation mode."""
    decayed = set(ClipTrainer.get_decay_parameter_names(None, model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1, cycle_momentum=False)
    rng = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randperm(len(data.images), generator=rng)[:batch]  # the pairs of this step: images,
        which = torch.randint(data.ids.shape[1], (batch,), generator=rng)  # and one of each image's captions
        images, ids = data.images[rows], data.ids[rows, which]
        outputs = model(images, ids)
        (loss(outputs, images, ids) if loss else clip_loss(*outputs[:3])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
    return model.eval()


@torch.no_grad()
def embed(model: MiniClip, images: Tensor, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of images (N, E) and of all of their captions (N x captions, E)."""
    texts = model.encode_text(ids.flatten(0, 1), normalize=True)
    return model.encode_image(images, normalize=True).numpy(), texts.numpy()


def recall(model: MiniClip, images: Tensor, ids: Tensor) -> dict[str, float]:
    """The metrics of miniclip/retrieval.py, as fractions of 1: all captions search all images, and back."""
    return retrieval_metrics(*embed(model, images, ids), np.arange(len(images)).repeat(ids.shape[1]))


def held_out_recall(model: MiniClip, data: Data) -> float:
    """Mean of R@1, R@5 and R@10 in both directions, over the held-out scenes."""
    return recall(model, data.held_out_images, data.held_out_ids)["mean_recall"]


def save(model: MiniClip, data: Data, folder: str):
    """Saves the model with all 49,408 tokens, so that `miniclip.load` and every command can use it; tokens that never
    occurred get random vectors."""
    small, text = model.config, model.config.text_cfg
    preprocess = replace(small.preprocess_cfg, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # as make_data does
    full = MiniClip(replace(small, text_cfg=replace(text, vocab_size=Tokenizer.vocab_size), preprocess_cfg=preprocess))
    weights = model.state_dict()
    table = full.text.token_embedding.weight.detach().clone()
    table[data.words] = weights["text.token_embedding.weight"]
    full.load_state_dict(weights | {"text.token_embedding.weight": table})
    full.save_pretrained(folder)
