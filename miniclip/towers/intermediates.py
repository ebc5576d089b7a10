"""What the blocks of a model's towers return, as OpenCLIP's `forward_intermediates` gives it: features of patches for
segmentation and detection, of words, of a ResNet's stages."""

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.model import MiniClip, TextTransformer, Tower, VisionTransformer
from miniclip.towers.coca import CocaTextTransformer, CocaVisionTransformer
from miniclip.towers.registry import altered
from miniclip.towers.resnet import ModifiedResNet
from miniclip.towers.siglip import SigLipVisionTransformer
from miniclip.towers.timm_model import TimmTower
from miniclip.utils.errors import InputError

TRANSFORMERS = {  # the norm after the blocks, and how many class tokens there are in front and behind
    VisionTransformer: ("ln_post", 1, 0), SigLipVisionTransformer: ("ln_post", 0, 0),
    CocaTextTransformer: ("ln_final", 0, 1), TextTransformer: ("ln_final", 0, 0),
}  # fmt: skip
NO_GRID = "patch_dropout leaves no grid of patches in training: call model.eval() first"
Indices = int | Sequence[int] | None  # the last n blocks, those with these numbers (-1: the last one), or all


class Found(NamedTuple):
    """What one tower returns."""

    layers: list[Tensor]  # of each block (B, L, W), of each stage of a ResNet (B, W, height, width)
    embeds: Tensor  # (B, E), by the blocks that ran
    norm: Callable[[Tensor], Tensor] = nn.Identity()  # the tower's norm after its blocks
    prefix: int = 0  # how many of the L positions are class tokens, at the start
    suffix: int = 0  # and how many at the end, behind a text


def forward_intermediates(
    model: MiniClip, image: Tensor | None = None, text: Tensor | None = None, image_indices: Indices = None,
    text_indices: Indices = None, stop_early: bool = False, normalize: bool = True,
    normalize_intermediates: bool = False, intermediates_only: bool = False, image_output_fmt: str = "NCHW",
    image_output_extra_tokens: bool = False, text_output_fmt: str = "NLC", text_output_extra_tokens: bool = False,
    output_logits: bool = False, output_logit_scale_bias: bool = False, custom_text: bool = True,
) -> dict[str, Tensor | list[Tensor]]:  # fmt: skip
    """Returns OpenCLIP's dictionary (3.3.0) for images (B, 3, S, S) and token ids (B, L), either of which may be None.

    `image_intermediates`: of each block in `image_indices` (B, W, height, width), or with "NLC" (B, patches, W), and
    with `image_output_extra_tokens` `image_intermediates_prefix`, its class token (B, 1, W); of a ResNet its stem (0)
    and four stages. `text_intermediates`: (B, L, W), and with `text_output_extra_tokens` `text_intermediates_suffix`,
    a CoCa's class token behind the text (B, 1, W). `normalize_intermediates` applies the norm after the blocks.
    `image_features` and `text_features` (B, E), of unit length with `normalize`, unless `intermediates_only`; with
    `stop_early` they are made from the last block taken, except those of texts without `custom_text` and of ResNets.
    `image_logits` and `text_logits` with `output_logits`, `logit_scale` and `logit_bias` with the last option. Raises
    InputError for blocks that are not there, for another format, for towers of transformers, as OpenCLIP has none of
    theirs, and for `normalize_intermediates` of a CoCa whose norm has another width."""
    output, output_logits = {}, output_logits and not intermediates_only
    if output_logits and (image is None or text is None):
        raise InputError("output_logits needs image and text: give both")
    if image is not None:
        image = image.to(next(model.visual.parameters()).dtype)
        how = image_indices, stop_early, normalize_intermediates, image_output_fmt, image_output_extra_tokens
        layers, embeds = run_image(model.visual, image, *how)
        output |= layers
        if not intermediates_only:
            output["image_features"] = F.normalize(embeds, dim=-1) if normalize else embeds
    if text is not None:
        if text_output_fmt != "NLC" and custom_text:
            raise InputError(f"text_output_fmt is {text_output_fmt!r}, not 'NLC'")
        found = run(model.text, text, text_indices, stop_early and custom_text)
        layers = [found.norm(x) if normalize_intermediates else x for x in found.layers]
        if text_output_extra_tokens and found.suffix:
            output["text_intermediates_suffix"] = [x[:, -found.suffix :] for x in layers]
        output["text_intermediates"] = [x[:, : text.shape[1]] for x in layers]
        if not intermediates_only:
            output["text_features"] = F.normalize(found.embeds, dim=-1) if normalize else found.embeds
    if output_logits:
        logits = model.logit_scale.exp() * output["image_features"] @ output["text_features"].T
        output["image_logits"] = logits if model.logit_bias is None else logits + model.logit_bias
        output["text_logits"] = output["image_logits"].T
    if output_logit_scale_bias:
        output["logit_scale"] = model.logit_scale.exp()
        output |= {} if model.logit_bias is None else {"logit_bias": model.logit_bias}
    return output


@singledispatch
def run_image(
    tower: Tower, image: Tensor, indices: Indices, stop_early: bool, norm: bool, layout: str, with_prefix: bool
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """What an image tower gives to the dictionary, and its embeddings (B, E)."""
    found = run(tower, image, indices, stop_early)
    maps = found.layers[0].ndim == 4
    if layout not in ("NCHW", "NLC")[: 1 if maps else 2]:
        raise InputError(f"image_output_fmt is {layout!r}, not {'NCHW' if maps else 'NCHW or NLC'}")
    layers = [found.norm(x) if norm else x for x in found.layers]
    patches = [x if maps else x[:, found.prefix :] for x in layers]
    if layout == "NCHW" and not maps:
        side = math.isqrt(patches[0].shape[1])
        if side * side != patches[0].shape[1]:
            raise InputError(NO_GRID)
        patches = [x.transpose(1, 2).unflatten(2, (side, side)).contiguous() for x in patches]
    prefix = {"image_intermediates_prefix": [x[:, : found.prefix] for x in layers]}
    return {"image_intermediates": patches} | (prefix if with_prefix and found.prefix else {}), found.embeds


@run_image.register
def _(tower: TimmTower, image: Tensor, indices: Indices, stop_early: bool, norm: bool, layout: str, with_prefix: bool):
    """By timm's function of the same name, as in OpenCLIP. Not all of its models have class tokens."""
    if tower.training and tower.patch_dropout and layout == "NCHW":
        raise InputError(NO_GRID)
    prefix = {"return_prefix_tokens": True} if with_prefix else {}
    options = {"indices": indices, "norm": norm, "stop_early": stop_early, "output_fmt": layout, **prefix}
    try:
        x, layers = tower.trunk.forward_intermediates(image, **options)
    except (TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        raise InputError(f"{tower.cfg.timm_model_name} of timm cannot give this: {error}") from error
    found = {"image_intermediates": [x[0] if isinstance(x, tuple) else x for x in layers]}
    if layers and isinstance(layers[0], tuple):
        found = {"image_intermediates_prefix": [x[1] for x in layers]} | found
    return found, tower.head(tower.trunk.forward_head(x))


def chosen(count: int, indices: Indices) -> list[int]:
    """The numbers of the blocks that `indices` means, of `count`, in order. Raises InputError for those not there."""
    if isinstance(indices, Sequence):
        wanted = sorted({i + count if i < 0 else i for i in indices})
    else:
        wanted = list(range(count - (count if indices is None else indices), count))
    if not wanted or wanted[0] < 0 or wanted[-1] >= count:
        known = f"from {-count} to {count - 1}"
        raise InputError(f"indices are {indices!r:.100}, but the tower has {count} blocks: {known}")
    return wanted


class Probe(nn.Module):
    """Stands behind a block and stores what that one returned."""

    def __init__(self, found: dict[int, Tensor], number: int):
        super().__init__()
        self.found, self.number = found, number

    def forward(self, x: Tensor, *_) -> Tensor:
        self.found.setdefault(self.number, x)  # not again when activations are recomputed
        return x


@singledispatch
def run(tower: Tower, inputs: Tensor, indices: Indices, stop_early: bool) -> Found:
    """One tower's forward pass. A tower of your own registers its function here."""
    norm, *tokens = next((form for kind, form in TRANSFORMERS.items() if isinstance(tower, kind)), (None,))
    if norm is None:
        raise InputError(f"forward_intermediates knows no blocks of a {type(tower).__name__}")
    return Found(*run_blocks(tower, inputs, indices, stop_early), getattr(tower, norm), *tokens)


@run.register
def _(tower: CocaVisionTransformer, inputs: Tensor, indices: Indices, stop_early: bool) -> Found:
    def norm(x: Tensor) -> Tensor:  # is behind the poolers, or before them
        if x.shape[2:] != tower.ln_post.normalized_shape:
            raise InputError("normalize_intermediates: CoCa's norm is of what its pooler returns, of another width")
        return tower.ln_post(x)

    return Found(*run_blocks(tower, inputs, indices, stop_early), norm, prefix=1)


def run_blocks(tower: Tower, inputs: Tensor, indices: Indices, stop_early: bool) -> tuple[list[Tensor], Tensor]:
    """A transformer with its blocks in the list `blocks`: what those taken return, and the embeddings."""
    taken, found, blocks = chosen(len(tower.blocks), indices), {}, nn.ModuleList()
    for number, block in enumerate(tower.blocks[: taken[-1] + 1 if stop_early else None]):
        blocks.extend([block, Probe(found, number)] if number in taken else [block])
    embeds = altered(tower, {"blocks": blocks}, wrappers=())(inputs)
    return list(found.values()), embeds


@run.register
def _(tower: ModifiedResNet, inputs: Tensor, indices: Indices, stop_early: bool) -> Found:
    found, stages = {}, {}
    for number in range(1, 5):
        stages[f"layer{number}"] = nn.Sequential(*tower.get_submodule(f"layer{number}"), Probe(found, number))
    stages["layer1"].insert(0, Probe(found, 0))
    taken = chosen(5, indices)
    embeds = altered(tower, stages, wrappers=())(inputs)
    return Found([found[number] for number in taken], embeds)
