"""Features of patches and words, and the projections with which late interaction compares them.

CLIP keeps one embedding of an image and one of a text. ColBERT (Khattab and Zaharia, arXiv 2004.12832) and FILIP (Yao
et al., arXiv 2111.07783) keep one for each position. A section of the model config with `token_dim` gives its tower a
second projection, `token_proj`, from the features of a position to that many numbers; the tower itself stays."""

import copy
import dataclasses
import warnings
from functools import partial, singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import TextConfig, VisionConfig
from miniclip.model import TOWERS, MiniClip, TextTransformer, Tower, VisionTransformer
from miniclip.utils.errors import InputError

TOKEN_DIM = 128  # ColBERT's


def _build(plain, cfg, embed_dim: int, quick_gelu: bool) -> Tower:
    if not 0 < cfg.token_dim <= 4096:
        raise InputError(f"token_dim is {cfg.token_dim}, not from 1 to 4096")
    return _add_projection(plain(cfg, embed_dim, quick_gelu), cfg.token_dim)


def _add_projection(tower: Tower, token_dim: int) -> Tower:
    tower.token_proj = nn.Linear(tower.width, token_dim, bias=False).requires_grad_(False)  # no other loss reads it
    if tower.rows:
        tower.rows = [*tower.rows, ("{t}token_proj.weight",) * 3]
    return tower


WITH_TOKENS: dict[type, type] = {}  # a section of the config -> the same one with `token_dim`


def token_section(section: type, module: str) -> type:
    """The section with `token_dim`, for a module, whose tower is that of the section with the projection."""
    fields = [("token_dim", int, TOKEN_DIM)]
    WITH_TOKENS[section] = cls = dataclasses.make_dataclass(f"Token{section.__name__}", fields, bases=(section,))
    TOWERS[cls] = partial(_build, TOWERS[section])
    cls.__module__ = module  # where pickle finds it
    return cls


TokenVisionConfig, TokenTextConfig = (token_section(cfg, __name__) for cfg in (VisionConfig, TextConfig))


def has_tokens(model: MiniClip) -> bool:
    """Whether a model has the projections of late interaction."""
    return type(model.config.vision_cfg) in WITH_TOKENS.values()


def add_tokens(model: MiniClip):
    """Gives a model the projections of late interaction, with random weights."""
    for name, tower in (("vision_cfg", model.visual), ("text_cfg", model.text)):
        cfg = getattr(model.config, name)
        if type(cfg) not in WITH_TOKENS:
            raise InputError(f"late interaction knows no patches or words of a {type(tower).__name__}")
        setattr(model.config, name, WITH_TOKENS[type(cfg)](**vars(cfg)))
        _add_projection(tower, TOKEN_DIM)


def without_tokens(model: MiniClip) -> MiniClip:
    """The model, or a copy without these projections, with a warning: other libraries' forms have no place for them."""
    if not has_tokens(model):
        return model
    warnings.warn("late interaction is not written: only MiniCLIP's own form has it", stacklevel=3)
    model = copy.deepcopy(model)
    for name, tower in (("vision_cfg", model.visual), ("text_cfg", model.text)):
        cfg = getattr(model.config, name)
        values = dict(vars(cfg))
        del values["token_dim"], tower.token_proj
        setattr(model.config, name, type(cfg).__base__(**values))
        tower.rows = type(tower).rows
    return model


@singledispatch
def token_features(tower: Tower, inputs: Tensor) -> Tensor:
    """The features of an image's patches, row by row, or of a text's positions: (B, L, W), in one forward pass. Those
    of padding are zero. A tower of your own registers its function here."""
    raise InputError(f"late interaction knows no patches or words of a {type(tower).__name__}")


@token_features.register
def _(tower: VisionTransformer, pixel_values: Tensor) -> Tensor:
    return tower.ln_post(tower.run_blocks(tower.embed_patches(tower.conv1(pixel_values)), is_causal=False)[:, 1:])


@token_features.register
def _(tower: TextTransformer, input_ids: Tensor) -> Tensor:
    x = tower.ln_final(tower.run_blocks(tower.embed_tokens(input_ids), is_causal=True))
    inside = torch.arange(x.shape[1], device=x.device) <= input_ids.argmax(dim=1, keepdim=True)  # up to the end token
    return x * inside[..., None]


def patch_vectors(tower: Tower, features: Tensor) -> Tensor:
    """Features of patches (B, P, W) to unit vectors (B, P, D)."""
    return F.normalize(tower.token_proj(features.to(tower.token_proj.weight.dtype)), dim=2)


def word_vectors(tower: Tower, features: Tensor) -> Tensor:
    """Features of words (B, L, W), zero where there is none, to vectors (B, L, D)."""
    features = features.to(tower.token_proj.weight.dtype)
    return tower.token_proj(features) / (features != 0).any(dim=2).sum(dim=1).clamp_min(1)[:, None, None]
