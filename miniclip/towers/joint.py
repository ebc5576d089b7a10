"""Several image encoders side by side, whose features are joined.

    "vision_cfg": {
        "towers": [{"hf_model_name": "package:efficientnet-lite0"}, {"hf_model_name": "package:efficientnet-lite2"}],
        "hf_proj_type": "linear", "hf_proj_dropout": 0.3
    }

Each entry of `towers` is the section of one encoder; its own projection does not exist. Each encoder's features count
the same: they are brought to unit length. Images are prepared as the encoder with the largest ones wants them, and then
for each other one resized to its size and given its mean and deviation.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import PreprocessConfig
from miniclip.model import TOWERS
from miniclip.towers.hf_config import HfVisionConfig
from miniclip.towers.huggingface import HfTower, HfVisionTower
from miniclip.towers.tokens import TOKEN_DIM, register_tokens, token_features
from miniclip.utils.config_files import fill
from miniclip.utils.errors import InputError


@dataclass
class JointVisionConfig(HfVisionConfig):
    towers: list = field(default_factory=list)  # sections of encoders; what is filled in there is saved here
    looks: list = field(default_factory=list)  # size, mean and std of each encoder's own images; filled in

    def __post_init__(self):
        self.towers, self.looks = list(self.towers), list(self.looks)
        if len(self.towers) < 2:
            raise InputError("towers needs two encoders or more")
        sections = self.sections()  # raises InputError for one that is wrong
        self.looks = self.looks or [_look(section) for section in sections]

    def sections(self) -> list[HfVisionConfig]:
        made = [fill(HfVisionConfig, values, f"tower {number}") for number, values in enumerate(self.towers)]
        for section, look in zip(made, self.looks):
            section.image_size = look["size"]
        return made

    def problems(self):
        self.hf_model_name = "joint"  # what is asked of one encoder does not hold here
        yield from super().problems()
        self.hf_model_name = None
        yield not self.hf_model_config and self.hf_pooler_type is None, "hf_pooler_type belongs to each of the towers"
        for section in self.sections():
            yield from section.problems()

    @property
    def pretrained(self) -> bool:
        return all(section.pretrained for section in self.sections())

    def largest(self) -> int:
        return max(range(len(self.looks)), key=lambda number: self.looks[number]["size"])

    def preprocess(self) -> dict:
        return self.sections()[self.largest()].preprocess()


def _look(section: HfVisionConfig) -> dict:
    cfg = PreprocessConfig(**section.preprocess())
    return {"size": cfg.size, "mean": list(cfg.mean), "std": list(cfg.std)}


class JointTower(HfTower):
    """Images (B, 3, S, S) to embeddings (B, E). A block is one of each encoder, counted from their ends."""

    def __init__(self, cfg: JointVisionConfig, embed_dim: int, quick_gelu: bool):
        nn.Module.__init__(self)
        self.cfg, self.image_size, sections = cfg, cfg.image_size, cfg.sections()
        self.towers = nn.ModuleList(HfVisionTower(section, embed_dim, quick_gelu) for section in sections)
        for tower in self.towers:
            tower.proj = nn.Identity()
        cfg.towers = [asdict(section) for section in sections]  # with what building them filled in
        self.width = cfg.width = sum(tower.width for tower in self.towers)
        self.proj = self.head(embed_dim)

    def features(self, pixel_values: Tensor) -> Tensor:
        found = [F.normalize(tower.features(x), dim=1) for tower, x in self.views(pixel_values)]
        return torch.cat(found, dim=1)

    def views(self, pixel_values: Tensor) -> Iterator[tuple[HfVisionTower, Tensor]]:
        """Each encoder, with the images as it wants them."""
        S, looks = self.image_size, self.cfg.looks
        if pixel_values.shape[1:] != (3, S, S):
            raise InputError(f"images are {tuple(pixel_values.shape)}, not (B, 3, {S}, {S})")
        given = looks[self.cfg.largest()]
        for tower, look in zip(self.towers, looks):
            mean, std, wanted_mean, wanted_std = (
                torch.tensor(values, dtype=pixel_values.dtype, device=pixel_values.device).view(3, 1, 1)
                for values in (given["mean"], given["std"], look["mean"], look["std"])
            )
            x = pixel_values
            if look["size"] != S:
                x = F.interpolate(x, (look["size"],) * 2, mode="bicubic", antialias=True)
            if (look["mean"], look["std"]) != (given["mean"], given["std"]):
                x = (x * std + mean - wanted_mean) / wanted_std
            yield tower, x

    @property
    def blocks(self) -> list[nn.Module]:
        lists = [tower.blocks for tower in self.towers]
        n = min(map(len, lists))
        return [nn.ModuleList(blocks) for blocks in zip(*(found[len(found) - n :] for found in lists))]

    def load_pretrained(self):
        for tower in self.towers:
            tower.load_pretrained()

    @property
    def may_skip_parameters(self) -> bool:
        return any(tower.may_skip_parameters for tower in self.towers)

    def checkpoint_activations(self, every: int):
        for tower in self.towers:
            tower.checkpoint_activations(every)

    def for_inference(self) -> "JointTower":
        fast = copy.copy(self)
        fast._modules = self._modules | {"towers": nn.ModuleList(tower.for_inference() for tower in self.towers)}
        return fast


TOWERS[JointVisionConfig] = JointTower


@register_tokens
@dataclass
class TokenJointVisionConfig(JointVisionConfig):
    token_dim: int = TOKEN_DIM


@token_features.register
def _(tower: JointTower, pixel_values: Tensor) -> Tensor:
    """Of each encoder to unit length, on the coarsest grid of them all."""
    found = [token_features(one, x) for one, x in tower.views(pixel_values)]
    side = min(math.isqrt(x.shape[1]) for x in found)
    grids = (F.normalize(x, dim=2).transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]),) * 2) for x in found)
    return torch.cat([F.adaptive_avg_pool2d(grid, side) for grid in grids], dim=1).flatten(2).transpose(1, 2)
