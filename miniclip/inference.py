"""How do I use a model? From a name to a model, from pictures and sentences to vectors."""

import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from miniclip.checkpoint import load_weights
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.tokenizer import Tokenizer
from miniclip.transforms import Preprocess, open_image


def load(name_or_path: str | Path, pretrained: str | Path | None = None, device: str | torch.device = "cpu"):
    """Gives `(model, preprocess, tokenizer)`, the model in evaluation mode.

    `name_or_path` is the name of a config (`miniclip.list_models()`), a config file, or a folder that MiniCLIP saved.
    `pretrained` is a local weight file in any layout that `miniclip.checkpoint` knows; a config without one is
    initialised randomly, with a warning. `preprocess` turns a PIL image into a (3, S, S) tensor, `tokenizer` a list
    of n strings into (n, context_length) ids. Raises InputError for an unknown name, and what `load_weights` raises.
    """
    if Path(name_or_path).is_dir():
        model = MiniClip.from_pretrained(name_or_path)
    else:
        model = MiniClip(MiniClipConfig.from_name(str(name_or_path)))
        if pretrained is None:
            warnings.warn(f"{name_or_path} has random weights: no pretrained file was named", stacklevel=2)
    if pretrained is not None:
        load_weights(model, pretrained)
    config = model.config
    return model.to(device).eval(), Preprocess(config.preprocess_cfg), Tokenizer(config.text_cfg.context_length)


@torch.inference_mode()
def embed_texts(
    model: MiniClip, tokenizer: Tokenizer, texts: Iterable[str], batch_size: int = 256, progress: bool = False
) -> np.ndarray:
    """Embeds n sentences: (n, E) float32, of unit length, in the order given.

    Sentences of about the same length share a batch, which is as long as its longest: with causal attention the
    padding that this saves has no influence on the result. Raises TypeError, with its place, for what is no string.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    device = model.logit_scale.device
    ids = tokenizer(texts, trim=True)
    lengths = ids.argmax(dim=1) + 1  # up to the end token, which has the highest id
    order = lengths.argsort(stable=True)
    embeds = torch.empty(len(texts), model.config.embed_dim)
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", disable=not progress, leave=False):
        rows = order[start : start + batch_size]
        batch = ids[rows, : lengths[rows].max()]
        with evaluating(model):
            embeds[rows] = model.encode_text(batch.to(device)).float().cpu()
    return F.normalize(embeds, dim=-1).numpy()


@torch.inference_mode()
def embed_images(
    model: MiniClip,
    preprocess: Preprocess,
    paths: Iterable[str | Path],
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """Embeds n image files: (n, E) float32, of unit length, in the order given.

    `num_workers` processes read and preprocess the files (0: this one does). Raises ImageError, naming the file, for
    one that cannot be read.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    weight = model.visual.conv1.weight
    loader = DataLoader(_ImageFiles(paths, preprocess), batch_size, num_workers=num_workers)
    embeds = torch.empty(len(paths), model.config.embed_dim)
    done = 0
    for pixel_values in tqdm(loader, desc="images", disable=not progress, leave=False):
        with evaluating(model):
            batch = model.encode_image(pixel_values.to(weight.device, weight.dtype)).float().cpu()
        embeds[done : done + len(batch)] = batch
        done += len(batch)
    return F.normalize(embeds, dim=-1).numpy()


@contextmanager
def evaluating(model: MiniClip):
    """Within it the model is in evaluation mode: nothing is dropped, whatever the mode it was in and returns to."""
    was_training = model.training
    try:
        yield model.eval()
    finally:
        model.train(was_training)


class _ImageFiles(Dataset):
    def __init__(self, paths: list[str | Path], preprocess: Preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(open_image(self.paths[index]))
