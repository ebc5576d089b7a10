"""Frozen towers: their features are computed once, before the first epoch, or taken from a cache."""

from functools import partial

import numpy as np
import torch

from miniclip.data import image_id, text_id
from miniclip.datasets.records import flatten_captions
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.evaluator import on_all_processes
from miniclip.inference.feature_cache import FeatureCache
from miniclip.model import MiniClip
from miniclip.training.dataset import RunDataset
from miniclip.training.finetune import hold_statistics
from miniclip.utils.errors import InputError


def freeze(model: MiniClip, image: str = "none", text: str = "none"):
    """Takes the towers of a model out of training: "none", "tower" (its projection still learns) or "all" of it.

    A frozen image tower with a text tower that learns to fit it is LiT (Zhai et al., arXiv 2111.07991). Raises
    InputError where nothing would be left to learn.
    """
    for tower, how in ((model.visual, image), (model.text, text)):
        if how != "none":
            tower.requires_grad_(False)
            tower.projection.requires_grad_(how == "tower")
            hold_statistics(tower)
    if not any(p.requires_grad for name, p in model.named_parameters() if name != "logit_scale"):
        raise InputError("both towers are frozen, projections included: nothing is left to learn. Freeze one of them")


class FrozenDataset(RunDataset):
    """The pairs of a RunDataset, drawn alike, with precomputed features instead of a frozen tower's inputs.

    `image_features` (images, W): item i has `image_features` (W,) instead of `pixel_values`. `text_features`
    (captions, W), of all captions in order: it has `text_features` (W,) instead of `caption`.
    """

    def __init__(self, *args, image_features: np.ndarray | None, text_features: np.ndarray | None, **kwargs):
        super().__init__(*args, **kwargs)
        # In shared memory: worker processes read them without a copy each.
        self.image_features, self.text_features = (
            None if features is None else torch.from_numpy(features).share_memory_()
            for features in (image_features, text_features)
        )
        counts = [len(record["caption"]) for record in self.records]
        self.first_caption = np.cumsum([0, *counts]).tolist()
        if image_features is not None:  # then nothing else reads the images again
            images = [(image_id(record["image"]), record["caption"]) for record in self.records]
            ids = [(image, text_id(caption)) for image, captions in images for caption in captions]
            self.caption_ids = torch.tensor(ids).share_memory_()

    def item(self, index: int) -> dict:
        row = index % len(self)
        first, end = self.first_caption[row : row + 2]
        number = self.rng(index).randrange(end - first)
        if self.image_features is None:
            item = super().item(index)
        else:
            ids = tuple(self.caption_ids[first + number].tolist())
            item = {"image_features": self.image_features[row], "pair_ids": ids}
            if self.text_features is None:
                item["caption"] = self.records[row]["caption"][number]
        if self.text_features is not None:
            item.pop("caption", None)
            item["text_features"] = self.text_features[first + number]
        return item


def freeze_towers(model: MiniClip, options, args, records, preprocess, tokenizer):
    """Freezes the towers that `options` name and computes their features for all records, or reads them from
    `--feature_cache`. Returns the dataset class to train on, None if nothing is frozen, and the image and text caches
    for evaluation."""
    image, text = options.frozen
    if (image, text) == ("none", "none"):
        return None, (None, None)
    freeze(model, image, text)
    model.to(args.device)
    show = {"progress": not args.disable_tqdm and args.process_index == 0, "project": False}
    features, caches, counts = [None, None], [None, None], []
    if image != "none":
        caches[0] = FeatureCache.for_images(options.feature_cache, model, preprocess)
        paths = [record["image"] for record in records]
        features[0] = on_all_processes(paths, partial(embed_images, model, preprocess, cache=caches[0], **show))
        counts.append(f"{caches[0].reused} of {len(paths)} images")
    if text != "none":
        caches[1] = FeatureCache.for_texts(options.feature_cache, model)
        texts, _ = flatten_captions(records)
        features[1] = on_all_processes(texts, partial(embed_texts, model, tokenizer, cache=caches[1], **show))
        counts.append(f"{caches[1].reused} of {len(texts)} captions")
    if args.process_index == 0:
        print(f"frozen towers: features computed once, without random crops; {', '.join(counts)} were cached")
    return partial(FrozenDataset, image_features=features[0], text_features=features[1]), tuple(caches)
