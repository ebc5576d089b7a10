"""CoCa's image tower made of an encoder of transformers or of a package, which may stay as it is.

    "vision_cfg": {"hf_model_name": "package:efficientnet-lite0", "attentional_pool": true, "attn_pooler_heads": 4}

The tower's features are the encoder's last feature map, all its positions. Its projection, which learns, makes the
decoder's image tokens of them, one of each position, and reads the embedding from these by attention. So the features
of a frozen encoder are computed once, before training, like those of other frozen towers."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from miniclip.model import TOWERS
from miniclip.towers.coca import AttentionalPooler, CocaImages
from miniclip.towers.hf_config import HfVisionConfig, ask
from miniclip.towers.huggingface import HfVisionTower
from miniclip.towers.registry import NOT_IN_OPENCLIP, check_images
from miniclip.towers.tokens import token_features


@dataclass
class CocaHfVisionConfig(HfVisionConfig, CocaImages):
    """`hf_proj_dropout` is that of the feature map's channels in training."""

    attentional_pool: bool = True
    attn_pooler_heads: int = 8
    channels: int | None = None  # of the feature map; filled in

    def problems(self):
        yield from super().problems()
        plain = self.attentional_pool is True and self.hf_pooler_type is None and self.hf_proj_type == "linear"
        yield plain, "attentional_pool is not true, or beside hf_pooler_type or hf_proj_type, which have no effect here"
        yield 0 < self.attn_pooler_heads <= 4096, "vision_cfg.attn_pooler_heads is not from 1 to 4096"


class Reader(nn.Module):
    """A feature map (B, N * C) to embeddings (B, E)."""

    def __init__(self, channels: int, embed_dim: int, heads: int, dropout: float):
        super().__init__()
        self.channels, self.dropout = channels, nn.Dropout(dropout)
        self.ln_map, self.ln_post = nn.LayerNorm(channels), nn.LayerNorm(embed_dim)
        self.to_tokens = nn.Linear(channels, embed_dim)
        self.attn_pool = AttentionalPooler(embed_dim, embed_dim, heads, 1)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def tokens(self, features: Tensor) -> Tensor:  # (B, N, E)
        return self.to_tokens(self.dropout(self.ln_map(features.unflatten(1, (-1, self.channels)))))

    def embed(self, tokens: Tensor) -> Tensor:  # (B, N, E) to (B, E)
        return self.proj(self.ln_post(self.attn_pool(tokens)[:, 0]))

    def forward(self, features: Tensor) -> Tensor:
        return self.embed(self.tokens(features))


class CocaHfVisionTower(HfVisionTower):
    """Images (B, 3, S, S) to embeddings (B, E), with tokens (B, N, E) of the N positions of the feature map."""

    def head(self, embed_dim: int) -> nn.Module:
        cfg = self.cfg
        if cfg.channels is None:
            with torch.no_grad(), torch.device("cpu"):
                image = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
                cfg.channels = ask(cfg.hf_model_name, token_features, self.eval(), image).shape[2]
            self.train()
        return Reader(cfg.channels, embed_dim, cfg.attn_pooler_heads, cfg.hf_proj_dropout)

    def features(self, pixel_values: Tensor) -> Tensor:  # (B, N * C)
        check_images(pixel_values, self.image_size)
        return token_features(self, pixel_values).flatten(1)

    def with_tokens(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, E), as `forward` returns them, and tokens (B, N, E), in one forward pass."""
        features = self.features
        for wrapper in self.wrappers:
            features = partial(wrapper, self, features)
        tokens = self.proj.tokens(features(inputs))
        return self.proj.embed(tokens), tokens

    def init_parameters(self):
        nn.init.normal_(self.proj.attn_pool.query)


TOWERS[CocaHfVisionConfig] = CocaHfVisionTower
NOT_IN_OPENCLIP[CocaHfVisionConfig] = "an encoder of transformers or of a package that CoCa's decoder reads"
