"""Towers whose blocks differ in size: TinyCLIP's 'auto' models (Wu et al., ICCV 2023, arXiv 2309.12314).

There training chose which channels, heads and MLP channels of a ViT-B/32 to keep, so each block has its own number of
heads and its own MLP width, and the width is no multiple of a head's. Only the files say these sizes:

    miniclip.load("TinyCLIP-auto-ViT-45M-32-Text-18M", pretrained="TinyCLIP-auto-ViT-45M-32-Text-18M-LAION400M.pt")

In a config `block_heads` and `block_mlp_widths` list them; where they are empty, as in the configs that ship, every
block is whole, until weights are loaded."""

import dataclasses
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from miniclip.config import LARGEST, TextConfig, VisionConfig
from miniclip.model import MLP, TOWERS, Block, MiniClip, TextTransformer, Tower, VisionTransformer
from miniclip.towers.registry import NOT_IN_OPENCLIP, SIZED_BY_FILE, attend, openclip_rows
from miniclip.utils.config_files import in_range
from miniclip.utils.errors import CheckpointError


class PrunedSizes:
    """What the sections of both towers have in common."""

    def __post_init__(self):
        self.block_heads = list(self.block_heads) or [self.width // self.head_width] * self.layers
        self.block_mlp_widths = list(self.block_mlp_widths) or [int(self.width * self.mlp_ratio)] * self.layers

    def problems(self):
        kind = "vision_cfg." if isinstance(self, VisionConfig) else "text_cfg."
        yield from in_range(kind, self, LARGEST)
        for name, limit in (("block_heads", LARGEST["heads"]), ("block_mlp_widths", 64 * LARGEST["width"])):
            sizes = getattr(self, name)
            fine = len(sizes) == self.layers and all(type(n) is int and 0 <= n <= limit for n in sizes)
            yield fine, f"{kind}{name} is {sizes!r:.100}, not a number from 0 for each of {self.layers} layers"


@dataclass
class PrunedVisionConfig(PrunedSizes, VisionConfig):
    """A ViT with the heads and the MLP channels of each block; 0 heads: no attention, 0 channels: no MLP."""

    block_heads: list = field(default_factory=list)
    block_mlp_widths: list = field(default_factory=list)

    def problems(self):
        yield from super().problems()
        yield self.image_size % self.patch_size == 0, "vision_cfg.image_size is not a multiple of patch_size"
        yield 0 <= self.patch_dropout < 1, "vision_cfg.patch_dropout is not in [0, 1)"


@dataclass
class PrunedTextConfig(PrunedSizes, TextConfig):
    """The text tower, likewise. `heads` are those before pruning, which change nothing."""

    head_width: int = 64
    block_heads: list = field(default_factory=list)
    block_mlp_widths: list = field(default_factory=list)


class PrunedAttention(nn.Module):
    """Attention whose heads together may be narrower than the tower."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, self.in_proj = heads, nn.Linear(width, 3 * heads * head_width)
        self.out_proj = nn.Linear(heads * head_width, width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        return self.out_proj(attend(*self.in_proj(x).chunk(3, dim=2), self.heads, is_causal=is_causal))


class PrunedBlock(Block):
    """A block of any number of heads and MLP channels, either of which may be missing."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, quick_gelu: bool):
        nn.Module.__init__(self)
        self.ln_1, self.attn = (nn.LayerNorm(width), PrunedAttention(width, heads, head_width)) if heads else [None] * 2
        self.ln_2, self.mlp = (nn.LayerNorm(width), MLP(width, hidden, quick_gelu)) if hidden else (None, None)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x if self.attn is None else x + self.attn(self.ln_1(x), is_causal)
        return x if self.mlp is None else x + self.mlp(self.ln_2(x))

    def init_parameters(self, layers: int):
        """As the blocks of model.py, except that each matrix has its own number of inputs."""
        for name, linear in self.named_modules():
            if isinstance(linear, nn.Linear):
                last = "out_proj" in name or "c_proj" in name
                nn.init.normal_(linear.weight, std=(linear.in_features * (2 * layers if last else 1)) ** -0.5)
                nn.init.zeros_(linear.bias)


class PrunedTower:
    """What both towers have in common: one of CLIP's without blocks, and blocks of these sizes."""

    key_rows = openclip_rows

    def __init__(self, cfg: PrunedSizes, embed_dim: int, quick_gelu: bool):
        section = VisionConfig if isinstance(cfg, VisionConfig) else TextConfig
        sizes = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(section)} | {"layers": 0}
        super().__init__(section(**sizes), embed_dim, quick_gelu)
        blocks = zip(cfg.block_heads, cfg.block_mlp_widths)
        self.blocks = nn.ModuleList(PrunedBlock(cfg.width, heads, cfg.head_width, n, quick_gelu) for heads, n in blocks)


class PrunedVisionTransformer(PrunedTower, VisionTransformer):
    pass


class PrunedTextTransformer(PrunedTower, TextTransformer):
    pass


def shape_like(model: MiniClip, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the pruned towers of a model, and their config, the sizes of weights in any layout. Returns the weights as
    TinyCLIP names them in memory, without the masks of pruning. Raises CheckpointError for heads of another width."""
    names = {name: re.sub(r"(image|text)_encoder_without_ddp\.", r"_\1_encoder.", name) for name in state_dict}
    weights = {names[name]: tensor for name, tensor in state_dict.items() if "l0_module." not in name}
    for kind, cfg in (("visual", model.config.vision_cfg), ("text", model.config.text_cfg)):
        if not isinstance(cfg, PrunedSizes):
            continue
        own = {name: t for name, t in weights.items() if ("visual." in name) == (kind == "visual")}
        heads, hidden = {}, {}
        for name, t in own.items():
            if found := re.search(r"blocks\.(\d{1,4})\.attn\.in_proj[._]weight$", name):
                heads[int(found[1])], odd = divmod(len(t), 3 * cfg.head_width)
                if odd or not len(t):
                    raise CheckpointError(f"{name} {tuple(t.shape)} has no heads {cfg.head_width} wide")
            elif found := re.search(r"blocks\.(\d{1,4})\.mlp\.c_fc\.weight$", name):
                hidden[int(found[1])] = len(t)
            elif name.endswith("positional_embedding") and t.ndim == 2:
                cfg.width = t.shape[1]
        cfg.layers = 1 + max([*heads, *hidden], default=0)
        cfg.block_heads = [heads.get(i, 0) for i in range(cfg.layers)]
        cfg.block_mlp_widths = [hidden.get(i, 0) for i in range(cfg.layers)]
        with torch.device(model.logit_scale.device):
            tower: Tower = TOWERS[type(cfg)](cfg, model.config.embed_dim, model.config.quick_gelu)
        setattr(model, kind, tower)
    return weights


TOWERS.update({PrunedVisionConfig: PrunedVisionTransformer, PrunedTextConfig: PrunedTextTransformer})
NOT_IN_OPENCLIP |= dict.fromkeys((PrunedVisionConfig, PrunedTextConfig), "blocks that differ in size")
SIZED_BY_FILE |= dict.fromkeys((PrunedVisionConfig, PrunedTextConfig), shape_like)
