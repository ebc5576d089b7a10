"""Captions of image files by a model with a decoder, and how near they are to people's."""

import re
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from miniclip.model import MiniClip
from miniclip.towers.registry import CAPTIONERS
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import open_image
from miniclip.utils.parallel import read_ahead


def captioner(model: MiniClip) -> MiniClip | None:
    """The model itself if it writes captions, else None: a copy for inference, with a precision, has no decoder."""
    return model if type(model) in CAPTIONERS else None


def lengths(model: MiniClip, seq_len: int | None = None) -> dict[str, int]:
    """How long captions are, as arguments of `CoCa.generate`: by default up to 30 tokens, or as many as are read."""
    seq_len = seq_len or min(30, model.config.text_cfg.context_length)
    return {"seq_len": seq_len, "min_seq_len": min(5, seq_len - 1)}


def caption_images(
    model: MiniClip, preprocess: Preprocess, tokenizer, paths: Sequence, batch_size: int = 32,
    num_workers: int | None = None, progress: bool = False, **how,
) -> list[str]:  # fmt: skip
    """Captions of n images, by path or as an ImageFile, in their order. `how`: arguments of `CoCa.generate`; by default
    as `miniclip caption`. Raises InputError for a model without a decoder, ImageError for a file that is damaged."""
    if captioner(model) is None:
        raise InputError("this model has no decoder, so it writes no captions: take a CoCa model, as coca_ViT-B-32")
    how = lengths(model) | how
    captions, levels = [], []
    read = lambda path: preprocess.levels(open_image(path, preprocess.scale))  # noqa: E731
    files = read_ahead(read, paths, num_workers, batch_size)
    for row, found in enumerate(tqdm(files, "captions", len(paths), disable=not progress, leave=False)):
        levels.append(found)
        if len(levels) == batch_size or row == len(paths) - 1:
            pixel_values = preprocess.normalize(torch.stack(levels).to(model.logit_scale.device))
            captions += tokenizer.decode(model.generate(pixel_values, **how))
            levels.clear()
    return captions


def words(caption: str) -> str:
    """A caption in lower case without punctuation, its words separated by single spaces."""
    return " ".join(re.findall(r"\w+", caption.lower()))


def scorers() -> tuple[type, type]:
    """BLEU's and CIDEr's classes. Raises InputError where their package is missing."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise InputError("CIDEr and BLEU need the package pycocoevalcap: pip install --no-deps pycocoevalcap") from None
    return Bleu, Cider


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr (Vedantam et al., arXiv 1411.5726) and BLEU-1 to BLEU-4 of each image's caption against its references, by
    pycocoevalcap, in `words`: published figures come from its tokenizer, which needs Java and differs slightly. CIDEr
    weighs words by how many of these images they are said of, so it is comparable for the same images only."""
    Bleu, Cider = scorers()  # noqa: N806
    wanted = {row: [words(text) for text in texts] for row, texts in enumerate(references)}
    found = {row: [words(text)] for row, text in enumerate(captions)}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    cider, _ = Cider().compute_score(wanted, found)
    return {"CIDEr": float(cider)} | {f"BLEU-{n}": float(score) for n, score in enumerate(bleu, 1)}
