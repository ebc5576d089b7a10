"""Training of late interaction (inference/late_interaction.py): a second stage on a model that stays as it is."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.inference.embed import WORDS, embed_images, embed_texts, in_pieces, positions
from miniclip.inference.feature_cache import FeatureCache
from miniclip.inference.late_interaction import maxsim
from miniclip.loss import find_duplicates, gather
from miniclip.model import ClipOutput, MiniClip
from miniclip.towers.tokens import add_tokens, has_tokens, patch_vectors, word_vectors
from miniclip.training.fsdp import uses_fsdp
from miniclip.utils.errors import InputError
from miniclip.weights.pretrained import is_folder


def late_interaction_loss(outputs: ClipOutput, batch: dict[str, Tensor], model: MiniClip) -> Tensor:
    """InfoNCE, as in `miniclip.loss`, of cosine plus MaxSim. A batch has `patches` (B, P, W) and `words` (B, L, W), the
    features of both towers. Across processes as `clip_loss`; duplicates are positives."""
    patches, words = patch_vectors(model.visual, batch["patches"]), word_vectors(model.text, batch["words"])
    with torch.autocast(words.device.type, enabled=False):
        images, texts, scale = (x.float() for x in outputs[:3])
        all_patches, all_words = gather(patches), gather(words)
        per_text = scale * (texts @ gather(images).T + maxsim(words, all_patches))
        alone = all_words is words  # one process
        per_image = per_text.T if alone else scale * (images @ gather(texts).T + maxsim(all_words, patches).T)
        same = find_duplicates(batch["pair_ids"], gather(batch["pair_ids"]))
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def late_interaction(model: MiniClip, options, args) -> Callable[[ClipOutput, dict], Tensor]:
    """The loss of `--loss late_interaction`. A model without the projections gets them; nothing else of it learns."""
    if not options.pretrained and not is_folder(options.model):
        untrained = f"{options.model} has no weights"
        raise InputError(f"late interaction is trained on a model that has been trained: {untrained}")
    if not has_tokens(model):
        add_tokens(model)
    model.logit_scale.requires_grad_(False)
    for tower in (model.visual, model.text):
        tower.token_proj.requires_grad_(True)
    if options.check_gradients or uses_fsdp(args):
        raise InputError("check_gradients and fsdp do not know the weights of loss late_interaction. Remove them")
    return partial(late_interaction_loss, model=model)


def position_features(model: MiniClip, preprocess, tokenizer, records, texts, folder, **how) -> dict[str, np.ndarray]:
    """The features that the loss reads, float16: `patches` (images, P, W) and `words` (texts, L, W). With a `folder`
    they are read from feature caches in it, or written there. `how`: options of `embed_images` and `embed_texts`."""
    image_twin, text_twin = positions(model, "visual"), positions(model, "text")
    length = image_twin.visual.length
    paths = [record["image"] for record in records]
    image_cache = folder and FeatureCache.for_images(folder, model, preprocess, positions=length)
    text_cache = folder and FeatureCache.for_texts(folder, model, positions=WORDS)
    patches = in_pieces(paths, partial(embed_images, image_twin, preprocess, cache=image_cache, **how), Tensor.half)
    words = in_pieces(texts, partial(embed_texts, text_twin, tokenizer, cache=text_cache, **how), Tensor.half)
    return {"patches": patches.reshape(len(paths), length, -1), "words": words.reshape(len(texts), WORDS, -1)}
