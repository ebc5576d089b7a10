"""Several encoders side by side in one tower, whose features are joined.

    "text_cfg": {"hf_proj_type": "linear", "hf_proj_dropout": 0.3, "context_length": 64, "towers": [
        {"hf_model_name": "package:all-MiniLM-L6-v2"}, {"hf_model_name": "package:all-mpnet-base-v2"}]}

Each entry of `towers` is the section of one encoder; its own projection does not exist. Each encoder's features count
the same: they are brought to unit length. Images are prepared as the encoder with the largest ones wants them, and then
for each other one resized to its size and given its mean and deviation. Each text encoder reads tokens of its own
tokenizer (`JointTokenizer`)."""

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import PreprocessConfig
from miniclip.model import TOWERS
from miniclip.towers.hf_config import HfTextConfig, HfVisionConfig
from miniclip.towers.hf_tokenizer import JointTokenizer
from miniclip.towers.huggingface import HfTextTower, HfTower, HfVisionTower
from miniclip.towers.registry import altered, check_images
from miniclip.towers.tokens import token_features, token_section
from miniclip.utils.config_files import fill
from miniclip.utils.errors import InputError
from miniclip.utils.files import replacing


class Joint:
    """What both sections share: `towers`, the sections of their encoders, of the class `one`."""

    one: type

    def __post_init__(self):
        self.towers = list(self.towers)

    def sections(self) -> list:
        """The encoders' sections. Raises InputError for one that is wrong."""
        if len(self.towers) < 2:
            raise InputError("towers needs two encoders or more")
        return [fill(self.one, values, f"tower {number}") for number, values in enumerate(self.towers)]

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


@dataclass
class JointVisionConfig(Joint, HfVisionConfig):
    towers: list = field(default_factory=list)  # sections of encoders; what is filled in there is saved here
    looks: list = field(default_factory=list)  # size, mean and std of each encoder's own images; filled in
    one = HfVisionConfig

    def __post_init__(self):
        super().__post_init__()
        self.looks = list(self.looks)
        if not self.looks:
            images = [PreprocessConfig(**section.preprocess()) for section in self.sections()]
            self.looks = [{"size": one.size, "mean": list(one.mean), "std": list(one.std)} for one in images]

    def sections(self) -> list[HfVisionConfig]:
        made = super().sections()
        for section, look in zip(made, self.looks):
            section.image_size = look["size"]
        return made

    def largest(self) -> int:
        return max(range(len(self.looks)), key=lambda number: self.looks[number]["size"])

    def preprocess(self) -> dict:
        return self.sections()[self.largest()].preprocess()


@dataclass
class JointTextConfig(Joint, HfTextConfig):
    """Its `context_length` is that of each encoder."""

    hf_pooler_type: str | None = None
    hf_proj_type: str | None = "linear"
    towers: list = field(default_factory=list)
    one = HfTextConfig

    def sections(self) -> list[HfTextConfig]:
        made = super().sections()
        for section in made:
            section.context_length = self.context_length
        return made


class JointTower(HfTower):
    """Base class of both towers. A block is one of each encoder, counted from their ends."""

    one: type[HfTower]

    def __init__(self, cfg: JointVisionConfig | JointTextConfig, embed_dim: int, quick_gelu: bool):
        nn.Module.__init__(self)
        self.cfg, sections = cfg, cfg.sections()
        self.towers = nn.ModuleList(self.one(section, embed_dim, quick_gelu) for section in sections)
        for tower in self.towers:
            setattr(tower, tower.projection_name, nn.Identity())
        cfg.towers = [asdict(section) for section in sections]  # with what building them filled in
        self.width = cfg.width = sum(tower.width for tower in self.towers)
        setattr(self, self.projection_name, self.head(embed_dim))

    def features(self, inputs: Tensor) -> Tensor:
        own = zip(self.towers, self.inputs(inputs))
        return torch.cat([F.normalize(tower.features(x), dim=1) for tower, x in own], dim=1)

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
        return altered(self, {"towers": nn.ModuleList(tower.for_inference() for tower in self.towers)})


class JointVisionTower(JointTower):
    """Images (B, 3, S, S) to embeddings (B, E)."""

    one = HfVisionTower
    image_size = property(lambda self: self.cfg.image_size)

    @property
    def classes(self) -> dict[int, str]:
        starts = accumulate((tower.width for tower in self.towers), initial=0)
        return {start + n: name for start, tower in zip(starts, self.towers) for n, name in tower.classes.items()}

    def inputs(self, pixel_values: Tensor) -> list[Tensor]:
        """The pixels of each encoder's own images."""
        check_images(pixel_values, self.image_size)
        S, looks = self.image_size, self.cfg.looks
        given, found = looks[self.cfg.largest()], []
        for look in looks:
            x = pixel_values
            if look["size"] != S:
                # In fp32: on a CPU torch resizes no bf16 with antialiasing.
                x = F.interpolate(x.float(), (look["size"],) * 2, mode="bicubic", antialias=True).to(x.dtype)
            if (look["mean"], look["std"]) != (given["mean"], given["std"]):
                values = given["mean"], given["std"], look["mean"], look["std"]
                mean, std, wanted_mean, wanted_std = torch.tensor(values).to(x, non_blocking=True).view(4, 3, 1, 1)
                x = (x * std + mean - wanted_mean) / wanted_std
            found.append(x)
        return found


class JointTextTower(JointTower):
    """Token ids (B, L) of a JointTokenizer to embeddings (B, E)."""

    kind, projection_name, one = "text", "text_projection", HfTextTower

    def __init__(self, cfg: JointTextConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg, embed_dim, quick_gelu)
        sizes = [tower.cfg.vocab_size for tower in self.towers]
        self.firsts = [1 + sum(sizes[:number]) for number in range(len(sizes))]  # where each one's ids begin
        cfg.vocab_size = 1 + sum(sizes)

    def inputs(self, input_ids: Tensor) -> list[Tensor]:
        """Each encoder's own ids."""
        turns = (input_ids[:, number :: len(self.towers)] for number in range(len(self.towers)))
        each = zip(turns, self.towers, self.firsts)
        return [torch.where(ids == 0, tower.pad_token_id, ids - first) for ids, tower, first in each]

    @cached_property
    def tokenizer(self) -> JointTokenizer:
        return JointTokenizer([tower.tokenizer for tower in self.towers], self.firsts)

    def save_files(self, directory: Path):
        with replacing(directory / "tokenizer") as scratch:
            for number, tokenizer in enumerate(self.tokenizer.parts):
                tokenizer.tokenizer.save_pretrained(scratch / str(number))

    def load_files(self, directory: Path):
        for number, tower in enumerate(self.towers):
            tower.load_files(directory, f"tokenizer/{number}")


TOWERS.update({JointVisionConfig: JointVisionTower, JointTextConfig: JointTextTower})
TokenJointVisionConfig = token_section(JointVisionConfig, __name__)


@token_features.register
def _(tower: JointVisionTower, pixel_values: Tensor) -> Tensor:
    """Of each encoder to unit length, on the coarsest grid of them all."""
    found = [token_features(one, x) for one, x in zip(tower.towers, tower.inputs(pixel_values))]
    side = min(math.isqrt(x.shape[1]) for x in found)
    grids = (F.normalize(x, dim=2).transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]),) * 2) for x in found)
    return torch.cat([F.adaptive_avg_pool2d(grid, side) for grid in grids], dim=1).flatten(2).transpose(1, 2)
