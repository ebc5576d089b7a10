"""Zero-shot classification: classes are described in words, without any example.

Each class becomes a vector, the mean of sentences about it (CLIP: Radford et al., arXiv 2103.00020, section 3.1).
Probabilities are among the named classes, one of which always wins; those of SigLIP's models are of each class alone.
For "is there any?" see moderate.py."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from miniclip.classify.prompts import fill, warn_of_poor_coverage
from miniclip.inference.embed import embed_images, embed_texts, for_inference
from miniclip.utils.errors import InputError


def build_zero_shot_classifier(
    model, tokenizer, classnames: Sequence[str], templates: Sequence[str | Callable[[str], str]],
    num_classes_per_batch: int | None = 10, device="cpu", use_tqdm: bool = False,
) -> Tensor:  # fmt: skip
    """Returns the unit vectors of classes as columns: (embed_dim, num_classes) float32 on `device`.

    A template is a string with {} for the class name, or a function of the name. A class is the normalised mean of its
    sentences' unit vectors, equal to OpenCLIP's to 1e-6. `num_classes_per_batch` are encoded at once (None: all). Warns
    of names that the text tower cannot read. Raises InputError without classes or templates, or for one without {}."""
    classnames, templates = (x if isinstance(x, str) else list(x) for x in (classnames, templates))
    for name, values in ("classnames", classnames), ("templates", templates):
        if isinstance(values, str) or not len(values):
            raise InputError(f"{name} must be a list with at least one entry, not {values!r}")
    warn_of_poor_coverage(tokenizer, classnames)
    step = max(1, num_classes_per_batch or len(classnames))
    model = for_inference(model, len(classnames) * len(templates))  # once for all batches
    phrases = [[fill(template, name) for template in templates] for name in classnames]
    starts = tqdm(range(0, len(phrases), step), desc="classes", disable=not use_tqdm, leave=False)
    parts = [embed_classes(model, tokenizer, phrases[start : start + step]) for start in starts]
    return torch.cat(parts, dim=1).to(device)


def embed_classes(model, tokenizer, sentences: Sequence[Sequence[str]]) -> Tensor:
    """Returns the unit vectors (embed_dim, n) of n classes, each the normalised mean of its sentences' vectors."""
    embeds = torch.from_numpy(embed_texts(model, tokenizer, [text for texts in sentences for text in texts]))
    means = [part.mean(dim=0) for part in embeds.split([len(texts) for texts in sentences])]
    return F.normalize(torch.stack(means), dim=1).T.contiguous()


def probabilities(model, image_embeds: np.ndarray, classifier: Tensor) -> np.ndarray:
    """Returns the probability of each class (N, C) float32 for unit-length embeddings (N, E): `shares`; of a model with
    SigLIP's bias the sigmoid of its logits, of each class alone, so that they need not add up to 1."""
    if model.logit_bias is None:
        return shares(model, image_embeds, classifier)
    scale, bias = model.logit_scale.detach().cpu().exp(), model.logit_bias.detach().cpu()
    return (scale * (torch.from_numpy(image_embeds) @ classifier.cpu()) + bias).sigmoid().numpy()


def shares(model, image_embeds: np.ndarray, classifier: Tensor) -> np.ndarray:
    """Returns the softmax over classes (N, C) of cosines at the model's temperature; a bias would change nothing."""
    cosines = torch.from_numpy(image_embeds) @ classifier.cpu()
    return (model.logit_scale.detach().cpu().exp() * cosines).softmax(dim=1).numpy()


def zero_shot_classify(model, preprocess, classifier: Tensor, images, classnames: Sequence[str]):
    """Classifies an image: `{"class_names": [...], "scores": (C,) probabilities, "top_class": name}`; a list of images
    gives a list of these. Raises ImageError for an image that cannot be read."""
    one, names = isinstance(images, (str, Path)), list(classnames)
    scores = probabilities(model, embed_images(model, preprocess, [images] if one else images), classifier)
    if len(names) != classifier.shape[1]:
        raise InputError(f"{len(names)} class names for a classifier of {classifier.shape[1]} classes")
    found = [{"class_names": names, "scores": row, "top_class": names[row.argmax()]} for row in scores]
    return found[0] if one else found
