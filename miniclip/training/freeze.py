"""What if a tower is not to learn?

Then it makes the same features of the same picture or sentence in every epoch, and they need to be computed only once:
before the first, or never, if a feature cache has them from an earlier run.
"""

from functools import partial

import numpy as np
import torch

from miniclip.data import CaptionDataset, image_id, text_id
from miniclip.datasets.records import flatten_captions
from miniclip.inference.embed import embed_images, embed_texts, on_all_processes
from miniclip.inference.feature_cache import FeatureCache
from miniclip.model import MiniClip
from miniclip.training.finetune import hold_statistics
from miniclip.utils.errors import InputError

LOCKS = ("none", "tower", "all")


def lock(model: MiniClip, image: str = "none", text: str = "none"):
    """Takes the towers of a model out of training: "none", "tower" (its projection goes on learning) or "all" of it.

    A locked image tower with a text tower that learns to fit it is LiT (Zhai et al., arXiv 2111.07991). Raises
    InputError where nothing would be left to learn.
    """
    for tower, projection, how in (
        (model.visual, model.visual.proj, image),
        (model.text, model.text.text_projection, text),
    ):
        if how != "none":
            tower.requires_grad_(False)
            projection.requires_grad_(how == "tower")
            hold_statistics(tower)
    if not any(p.requires_grad for name, p in model.named_parameters() if name != "logit_scale"):
        raise InputError("both towers are locked, projections included: nothing is left to learn")


class LockedDataset(CaptionDataset):
    """The pairs of a CaptionDataset, drawn alike, with features in the place of what a locked tower would see.

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
        self.counts = [len(record["caption"]) for record in self.records]
        self.first_caption = np.cumsum([0, *self.counts[:-1]]).tolist()
        images = [(image_id(record["image"]), record["caption"]) for record in self.records]
        ids = [(image, text_id(caption)) for image, captions in images for caption in captions]
        self.caption_ids = torch.tensor(ids).share_memory_()

    def pair_ids(self, index: int) -> tuple[int, int]:
        row = index % len(self)
        number = self.rng(index).randrange(self.counts[row])
        return tuple(self.caption_ids[self.first_caption[row] + number].tolist())

    def item(self, index: int) -> dict:
        row = index % len(self)
        number = self.rng(index).randrange(self.counts[row])
        if self.image_features is None:
            item = super().item(index)
        else:
            item = {"image_features": self.image_features[row], "pair_ids": self.pair_ids(index)}
            if self.text_features is None:
                item["caption"] = self.records[row]["caption"][number]
        if self.text_features is not None:
            item.pop("caption", None)
            item["text_features"] = self.text_features[self.first_caption[row] + number]
        return item


def lock_towers(
    model: MiniClip, image: str, text: str, args, records: list[dict], preprocess, tokenizer, folder: str | None
):
    """Locks towers (see `lock`) and computes what they give for all records, or takes it from the cache in `folder`.

    Gives the class of the dataset to train on, a LockedDataset that wants the arguments of a CaptionDataset, and the
    two caches for evaluation, None for a tower that is not locked. `args` are the ClipTrainingArguments.
    """
    lock(model, image, text)
    model.to(args.device)
    show = {"progress": not args.disable_tqdm and args.process_index == 0, "project": False}
    features, caches, counts = [None, None], [None, None], []
    if image != "none":
        caches[0] = FeatureCache.for_images(folder, model, preprocess)
        paths = [record["image"] for record in records]
        embed = partial(embed_images, model, preprocess, cache=caches[0], **show)
        features[0] = on_all_processes(args, paths, embed)
        counts.append(f"{caches[0].reused} of {len(paths)} images")
    if text != "none":
        caches[1] = FeatureCache.for_texts(folder, model)
        texts, _ = flatten_captions(records)
        embed = partial(embed_texts, model, tokenizer, cache=caches[1], **show)
        features[1] = on_all_processes(args, texts, embed)
        counts.append(f"{caches[1].reused} of {len(texts)} captions")
    if args.process_index == 0:
        print(f"locked towers: features computed once, of images without random crops; {', '.join(counts)} were cached")
    return partial(LockedDataset, image_features=features[0], text_features=features[1]), tuple(caches)
