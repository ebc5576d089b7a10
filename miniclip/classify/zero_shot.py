"""What is in a picture, where the classes are words and there was no example of any?

Each class becomes a vector, the mean of a few sentences about it; a picture belongs to the class whose vector is
nearest to its own, and the model's temperature turns the cosines into probabilities (CLIP: Radford et al., arXiv
2103.00020, section 3.1):

    python -m miniclip zero_shot --model runs/mine --images photos --classes dog,cat,horse

Of pictures in a folder for each class the truth is known: then top-1, top-5, the mean recall of the classes and a
confusion picture come with it. Probabilities are among the classes named: one of them always wins, however far it is.
For "is there any?" see moderate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.classify.prompts import (
    fill,
    warn_if_illegible,
)
from miniclip.utils.errors import InputError

if TYPE_CHECKING:  # all of it is imported when it is used: --help answers at once
    import numpy as np
    from torch import Tensor


def build_zero_shot_classifier(
    model,
    tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
    num_classes_per_batch: int | None = 10,
    device="cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """The vectors of classes, one a column: (embed_dim, num_classes) float32, of unit length, on `device`.

    A template is a string with {} for the class name, or a function of it that gives a sentence. A class is the mean of
    its sentences' unit vectors, brought to unit length again: OpenCLIP's semantics, and its results to 1e-6. So many
    classes are in memory at once; None: all. `image_embeds @ classifier` are cosines. Warns of names that the text
    tower cannot read. Raises InputError where there is no class or template, or a template makes no use of the name.
    """
    import torch
    from tqdm.auto import tqdm

    from miniclip.inference.embed import for_inference

    classnames, templates = (x if isinstance(x, str) else list(x) for x in (classnames, templates))
    for name, values in (("classnames", classnames), ("templates", templates)):
        if isinstance(values, str) or not len(values):
            raise InputError(f"{name} is a list of at least one, not {values!r}")
    warn_if_illegible(tokenizer, classnames)
    step = max(1, num_classes_per_batch or len(classnames))
    model = for_inference(model, len(classnames) * len(templates))  # laid out once for all batches
    parts = [
        embed_classes(model, tokenizer, [[fill(t, name) for t in templates] for name in classnames[at : at + step]])
        for at in tqdm(range(0, len(classnames), step), desc="classes", disable=not use_tqdm, leave=False)
    ]
    return torch.cat(parts, dim=1).to(device)


def embed_classes(model, tokenizer, sentences: Sequence[Sequence[str]]) -> Tensor:
    """The unit vectors of n classes, (embed_dim, n), each the mean of those of its own sentences."""
    import torch
    import torch.nn.functional as F

    from miniclip.inference.embed import embed_texts

    embeds = torch.from_numpy(embed_texts(model, tokenizer, [text for texts in sentences for text in texts]))
    means = [part.mean(dim=0) for part in embeds.split([len(texts) for texts in sentences])]
    return F.normalize(torch.stack(means), dim=1).T.contiguous()


def probabilities(model, image_embeds: np.ndarray, classifier: Tensor) -> np.ndarray:
    """Those of each class for images (N, E), of unit length: (N, C) float32, which add up to 1 for an image. Softmax of
    the cosines by the model's own temperature; SigLIP's bias, the same for all classes, makes no difference to it."""
    import torch

    cosines = torch.from_numpy(image_embeds) @ classifier.cpu()
    return (model.logit_scale.detach().cpu().exp() * cosines).softmax(dim=1).numpy()


def zero_shot_classify(model, preprocess, classifier: Tensor, images, classnames: Sequence[str]):
    """What a picture shows: `{"class_names": [...], "scores": (C,) probabilities, "top_class": name}`; of several
    pictures a list of these. `images` is a path, or a list. Raises ImageError for what cannot be read."""
    from miniclip.inference.embed import embed_images

    one = isinstance(images, (str, Path))
    scores = probabilities(model, embed_images(model, preprocess, [images] if one else images), classifier)
    names = list(classnames)
    if len(names) != classifier.shape[1]:
        raise InputError(f"{len(names)} class names for a classifier of {classifier.shape[1]} classes")
    found = [{"class_names": names, "scores": row, "top_class": names[row.argmax()]} for row in scores]
    return found[0] if one else found
