"""Frozen towers and blocks, and the features of a frozen tower: computed once before training, or read from a cache."""

import pkgutil
import re
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from miniclip.data import image_id, text_id
from miniclip.datasets.records import flatten_captions
from miniclip.inference.embed import embed_images, embed_texts, on_all_processes
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.inference.precision import settle
from miniclip.model import MiniClip, Tower
from miniclip.towers.huggingface import HfTower
from miniclip.training.closed_form import start_in_closed_form, starts_in_closed_form
from miniclip.training.dataset import RunDataset
from miniclip.utils.errors import InputError

AFTER_BLOCKS = re.compile(r"norm|^_?bn|ln_|final|proj|pool|head")  # parts of the names of what follows the blocks


def freeze(model: MiniClip, image: str = "none", text: str = "none"):
    """Freezes "none", "all", "tower" (all but the projection) or "all_but_N" (all but the last N blocks, the last norm
    and the projection) of each tower of a model.

    A frozen image tower with a text tower that is trained to fit it is LiT (Zhai et al., arXiv 2111.07991). The
    backward pass stops at the frozen part, which saves most of its time and memory. OpenCLIP's unlocked groups, N + 1,
    count the projection too. Raises InputError for too many blocks."""
    for kind, tower, how in (("image", model.visual, image), ("text", model.text, text)):
        if how == "none":
            continue
        blocks = int(how[8:]) if how.startswith("all_but_") else 0
        if blocks > (n := len(tower.blocks)):
            raise InputError(f"{how}: the {kind} tower has {n} blocks. Choose a number from 0 to {n}")
        depth = depths(tower)
        for name, p in tower.named_parameters():
            if not name.startswith("token_proj"):  # which learn with late interaction, and only then
                p.requires_grad_(blocks > 0 and depth[name] <= blocks)
        tower.projection.requires_grad_(how != "all")
        hold_statistics(tower)


def depths(tower: nn.Module) -> dict[str, int]:
    """The distance of each parameter from the top of a tower of n blocks: 0 after the blocks (norm, projection), 1 in
    the last block, n in the first, n + 1 before them (embeddings, positions). Between two blocks the upper one counts.
    Parameters are registered in the order of their use, except embeddings and attention biases in some encoders."""
    number = {p: i for i, block in enumerate(tower.blocks) for p in block.parameters()}
    n = len(tower.blocks)
    found = {}
    last, place = -1, ""  # the last block met, of the encoder at this place
    for name, p in tower.named_parameters():
        if "trunk." in name and place != (here := name.partition("trunk.")[0]):  # of several, the next one begins
            last, place = -1, here
        last = number.get(p, last)
        top = last < n - 1 or any(map(AFTER_BLOCKS.search, name.split(".")))
        after = last >= 0 and ("embed" not in name or "attnpool" in name) and top
        found[name] = n - number[p] if p in number else n - 1 - last if after else n + 1
    return found


def hold_statistics(tower: Tower):
    """Keeps each BatchNorm in evaluation mode, trained or not: few small batches give worse statistics."""
    tower.fixed_norms = tuple(module for module in tower.modules() if isinstance(module, _BatchNorm))
    tower.train(tower.training)


class FrozenDataset(RunDataset):
    """A RunDataset, with the same draws, whose items have precomputed features (W,) of frozen towers: a row of
    `image_features` (images, W) for `pixel_values`, one of `text_features` (all captions, W) for `caption`. For late
    interaction it also has one of `patches` (images, P, W) and of `words` (all captions, L, W)."""

    def __init__(self, *args, image_features=None, text_features=None, patches=None, words=None, **kwargs):
        super().__init__(*args, **kwargs)
        # Not in shared memory, of which a container has 64 MB: workers are forked, or torch moves the tensors itself.
        arrays = [x if x is None else torch.from_numpy(x) for x in (image_features, text_features, patches, words)]
        self.image_features, self.text_features, self.patches, self.words = arrays
        self.first_caption = np.cumsum([0, *(len(record["caption"]) for record in self.records)]).tolist()
        if image_features is not None:  # the images are not read again, so their ids are computed here
            images = ((image_id(record["image"]), record["caption"]) for record in self.records)
            ids = [(image, text_id(caption)) for image, captions in images for caption in captions]
            self.caption_ids = torch.tensor(ids)

    def item(self, index: int) -> dict:
        row = index % len(self)
        first, end = self.first_caption[row : row + 2]
        number = self.rng(index).randrange(end - first)
        if self.image_features is None:
            item = super().item(index)
        else:
            ids = tuple(self.caption_ids[first + number].tolist())
            item = {"image_features": self.image_features[row], "pair_ids": ids}
        if self.text_features is not None:
            item.pop("caption", None)
            item["text_features"] = self.text_features[first + number]
        elif self.image_features is not None:
            item["caption"] = self.records[row]["caption"][number]
        if self.patches is not None:
            item |= {"patches": self.patches[row], "words": self.words[first + number]}
        return item


def freeze_towers(model: MiniClip, options, args, records, preprocess, tokenizer, dataset_class=RunDataset):
    """Freezes what `options` name, and computes the features of towers that are frozen as wholes, or of both where
    projections begin in closed form, or reads them from `--feature_cache`. Returns the dataset class for training, and
    the image and text caches for evaluation."""
    freeze(model, options.freeze_image, options.freeze_text)
    if not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("logit_")):
        raise InputError("both towers are frozen, projections included: nothing is left to train. Freeze one of them")
    args.chunks_help &= not all(options.frozen)
    start = starts_in_closed_form(model, options)  # from all features, also of towers whose last blocks then learn
    if not any(wanted := [frozen or start for frozen in options.frozen]):
        if options.feature_cache and not options.check_gradients:
            raise InputError("feature_cache has no effect: no tower is frozen and no projection begins in closed form")
        return dataset_class, (None, None)
    model.to(args.device)
    show = {"progress": not args.disable_tqdm and args.process_index == 0, "project": False}
    features, caches = [None, None], [None, None]  # of images, of texts
    counts = []  # what is printed of them
    precision = settle(model, "auto", args.process_index > 0) if args.bf16 and not options.check_gradients else "fp32"
    fast = inference_copy(model, precision)
    if wanted[0]:
        caches[0] = FeatureCache.for_images(options.feature_cache, model, preprocess, precision)
        paths = [record["image"] for record in records]
        features[0] = on_all_processes(paths, partial(embed_images, fast, preprocess, cache=caches[0], **show))
        counts.append(f"{caches[0].reused} of {len(paths)} images")
    if wanted[1]:
        caches[1] = FeatureCache.for_texts(options.feature_cache, model, precision)
        texts, _ = flatten_captions(records)
        features[1] = on_all_processes(texts, partial(embed_texts, fast, tokenizer, cache=caches[1], **show))
        counts.append(f"{caches[1].reused} of {len(texts)} captions")
    if args.process_index == 0:
        whose = "frozen towers" if any(options.frozen) else "the start"
        print(f"{whose}: features computed once, without random crops; {', '.join(counts)} were cached")
    if start:
        known = model.visual.classes if isinstance(model.visual, HfTower) else {}
        prompts = [f"a photo of a {name}" for name in known.values()]
        names = embed_texts(fast, tokenizer, prompts, cache=caches[1], project=False) if prompts else None
        start_in_closed_form(model, options, args, records, *features, names)
    for number, frozen in enumerate(options.frozen):
        if not frozen:  # its features change from now on
            features[number] = caches[number] = None
    if options.frozen == (False, False):
        return dataset_class, (None, None)
    more = {}
    if options.loss == "late_interaction":
        compute = pkgutil.resolve_name("miniclip.training.late_interaction:position_features")  # it imports much
        more = compute(model, preprocess, tokenizer, records, texts, options.feature_cache, **show)
    return partial(FrozenDataset, image_features=features[0], text_features=features[1], **more), tuple(caches)
