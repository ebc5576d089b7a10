"""CLIP's ResNet: OpenAI's RN50 to RN50x64, OpenCLIP's of the same names, and TinyCLIP's.

A ResNet-D (He et al., arXiv 1812.01187) whose strided convolutions are averaged first, against aliasing (Zhang, arXiv
1904.11486), and which ends in attention from the mean of its positions to each of them: section 2.4 of the paper. A
list in `layers` tells it, as in OpenCLIP. Submodules have OpenCLIP's names, so weights need no table of names."""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.config import LARGEST
from miniclip.model import TOWERS, Tower
from miniclip.towers.huggingface import fuse_norms
from miniclip.towers.registry import IN_OPENCLIP, attend, check_images
from miniclip.utils.config_files import in_range


@dataclass
class ResNetConfig:
    """The image tower CLIP's ResNet. Widths in channels, sizes in pixels."""

    layers: tuple[int, int, int, int] = (3, 4, 6, 3)  # blocks of each stage
    width: int = 64  # of the first stage's convolutions; the features are 32 times as wide
    image_size: int = 224
    head_width: int = 64  # channels per head of the attention at the end
    patch_size: int | None = None  # in OpenCLIP's configs: null, there are no patches
    pretrained = False

    def problems(self):
        sizes = {name: limit for name, limit in LARGEST.items() if name != "layers"}
        yield from in_range("vision_cfg.", self, sizes | {"width": 1 << 11})
        yield all(0 < n <= 1000 for n in self.layers), f"vision_cfg.layers is {self.layers}, not four from 1 to 1000"
        yield self.patch_size is None, "vision_cfg.patch_size is given, but a ResNet has no patches"
        yield self.image_size % 32 == 0, "vision_cfg.image_size is not a multiple of 32"
        yield self.width % 2 == 0, "vision_cfg.width is odd"
        yield self.width * 32 % self.head_width == 0, "vision_cfg.head_width does not divide 32 times the width"

    def preprocess(self) -> dict:
        return {"size": self.image_size}


class Bottleneck(nn.Module):
    """Three convolutions around which the input is added: (B, inputs, S, S) to (B, 4 width, S / stride, S / stride)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            layers = nn.AvgPool2d(stride), nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            self.downsample = nn.Sequential(OrderedDict(zip(("-1", "0", "1"), layers)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """Attention of one query, the mean of all positions: (B, W, S, S) to (B, W). `c_proj` is the tower's projection."""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(1 + grid**2, width))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, S * S, W)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        return attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads)[:, 0]


class ModifiedResNet(Tower):
    """Images (B, 3, S, S) to embeddings (B, E). A block is one Bottleneck."""

    projection_name = "attnpool.c_proj"

    def __init__(self, cfg: ResNetConfig, embed_dim: int, quick_gelu: bool):
        super().__init__()
        W = cfg.width
        self.image_size, self.width = cfg.image_size, 32 * W
        self.conv1, self.bn1 = nn.Conv2d(3, W // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(W // 2)
        self.conv2, self.bn2 = nn.Conv2d(W // 2, W // 2, 3, padding=1, bias=False), nn.BatchNorm2d(W // 2)
        self.conv3, self.bn3 = nn.Conv2d(W // 2, W, 3, padding=1, bias=False), nn.BatchNorm2d(W)
        inputs = W
        for number, blocks in enumerate(cfg.layers):
            stage = nn.Sequential()
            width = W << number
            for i in range(blocks):
                stage.append(Bottleneck(inputs, width, stride=2 if number and i == 0 else 1))
                inputs = 4 * width
            self.add_module(f"layer{number + 1}", stage)
        self.attnpool = AttentionPool(cfg.image_size // 32, self.width, self.width // cfg.head_width, embed_dim)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def features(self, pixel_values: Tensor) -> Tensor:
        check_images(pixel_values, self.image_size)
        x = pixel_values.contiguous(memory_format=torch.channels_last)  # faster convolutions
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        for number, block in enumerate(self.blocks):
            recompute = self.checkpoint_every and number % self.checkpoint_every == 0 and torch.is_grad_enabled()
            how = {"context_fn": lambda block=block: (nullcontext(), statistics_kept(block))}
            how = {} if torch.compiler.is_compiling() else how
            x = checkpoint(block, x, use_reentrant=False, **how) if recompute else block(x)
        return self.attnpool(x)

    def init_parameters(self):
        """Draws attention as OpenAI's code does. With a gain of 0 each block begins as the identity (arXiv
        1706.02677). Convolutions start as PyTorch's do."""
        pool = self.attnpool
        weights = (layer.weight for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj))
        for parameter in (pool.positional_embedding, *weights):
            nn.init.normal_(parameter, std=self.width**-0.5)
        for block in self.blocks:
            nn.init.zeros_(block.bn3.weight)

    @torch.no_grad()
    def for_inference(self) -> "ModifiedResNet":
        """A copy with each BatchNorm fused into the convolution before it."""
        return fuse_norms(copy.deepcopy(self).float().eval()).to(memory_format=torch.channels_last)


@contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """A context, of the second forward pass of checkpointing, in which BatchNorms do not count the batch again."""
    before = [(statistic, statistic.clone()) for statistic in block.buffers()]
    try:
        yield
    finally:
        for statistic, value in before:
            statistic.copy_(value)


def from_weights(weights: dict[str, Tensor]) -> dict:
    """The section with the sizes of an image tower's weights, named as in OpenCLIP without the prefix."""
    stages = [{name.split(".")[1] for name in weights if name.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
    grid = math.isqrt(len(weights["attnpool.positional_embedding"]) - 1)
    return {"layers": tuple(map(len, stages)), "width": len(weights["layer1.0.conv1.weight"]), "image_size": 32 * grid}


TOWERS[ResNetConfig] = ModifiedResNet
IN_OPENCLIP.add(ResNetConfig)
