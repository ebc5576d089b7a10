"""SigLIP's two towers, also of SigLIP 2 with images of one size (Zhai et al., arXiv 2303.15343; Tschannen et al., arXiv
2502.14786): a ViT without a class token that one learned query reads by attention, and a text tower whose positions
all see each other, read at its last position, which is padding in most captions.

    "vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {..., "no_causal_mask": true, "proj_bias": true, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}

as in OpenCLIP, whose image tower timm builds; here a name of timm's only says the sizes, and `"pool_type": "map"` with
sizes of your own makes another. The features of images are the embeddings: there is no projection."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from miniclip.checkpoint import BLOCK_ROWS, OPERATIONS
from miniclip.config import LARGEST, VisionConfig
from miniclip.model import MLP, TOWERS, Block, Tower
from miniclip.towers.hf_config import open_tokenizer
from miniclip.towers.hf_tokenizer import CLEAN, TOKENIZER_FILES
from miniclip.towers.registry import IN_OPENCLIP, SIZED_BY_FILE, TOKENIZER_BESIDE, attend, check_images
from miniclip.towers.variants import VariantTextConfig, VariantTextTransformer, right_kwargs, set_kwargs
from miniclip.utils.config_files import in_range
from miniclip.utils.errors import InputError

EPS, TANH = 1e-6, {"approximate": "tanh"}
TIMM = {  # width, layers, heads, MLP width over width
    "base": (768, 12, 12, 4.0), "large": (1024, 24, 16, 4.0), "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}  # fmt: skip
# Those that timm, and so OpenCLIP, builds with GELU by the hyperbolic tangent. Google trained all with it.
WITH_TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt)")
TIMM_BLOCK = "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"  # in the order of BLOCK_ROWS


@dataclass
class SigLipVisionConfig(VisionConfig):
    """The image tower. `timm_model_name` fills in the sizes; without it they are those of ViT-B/16 unless given."""

    image_size: int | None = None
    layers: int | None = None
    width: int | None = None
    head_width: int | None = None
    mlp_ratio: float | None = None
    patch_size: int | None = None
    act_kwargs: dict | None = None  # {"approximate": "tanh"}: GELU by the hyperbolic tangent
    pool_type: Literal["map"] = "map"
    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: Literal["map"] = "map"
    timm_proj: Literal["none"] = "none"

    def __post_init__(self):
        name = self.timm_model_name or "vit_base_patch16_siglip_224"
        if (found := re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)", name)) is None or found[1] not in TIMM:
            raise InputError(f"timm_model_name is {name!r}, not SigLIP's ViT of a fixed image size ({', '.join(TIMM)})")
        width, layers, heads, ratio = TIMM[found[1]]
        head_width = width // heads if self.timm_model_name or not self.width else 64
        usual = {"width": width, "layers": layers, "head_width": head_width, "mlp_ratio": ratio}
        usual |= {"patch_size": int(found[2]), "image_size": int(found[3])}
        if self.timm_model_name:
            usual["act_kwargs"] = TANH if WITH_TANH.match(name) else None
        for field, value in usual.items():
            if (given := getattr(self, field)) is None:
                setattr(self, field, value)
            elif self.timm_model_name and given != value:
                raise InputError(f"{field} is {given}, but {value} in {name}: remove timm_model_name or {field}")

    def problems(self):
        yield from in_range("vision_cfg.", self, LARGEST)
        yield self.width % self.head_width == 0, "vision_cfg.width is not a multiple of head_width"
        yield self.image_size >= self.patch_size, "vision_cfg.image_size is less than a patch"
        yield 0 <= self.patch_dropout < 1, "vision_cfg.patch_dropout is not in [0, 1)"
        yield not self.timm_model_pretrained, "vision_cfg.timm_model_pretrained is true: name weights by pretrained"
        yield from right_kwargs("vision_cfg", act_kwargs=self.act_kwargs)

    def preprocess(self) -> dict:
        return {"size": self.image_size, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}


@dataclass
class SigLipTextConfig(VariantTextConfig):
    """The text tower. `tokenizer_kwargs` {"clean": "canonicalize"}: lower case, without punctuation."""

    tokenizer_options = ("clean",)

    def problems(self):
        yield from super().problems()
        clean = (self.tokenizer_kwargs or {}).get("clean", "whitespace")
        yield clean in CLEAN, f"text_cfg.tokenizer_kwargs: clean is {clean!r:.50}, none of {', '.join(CLEAN)}"


class LatentPool(nn.Module):
    """Attention of one learned query to all positions, then an MLP: (B, L, W) to (B, W)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads, self.latent = heads, nn.Parameter(torch.empty(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width, int(width * mlp_ratio), quick_gelu=False)

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = self.q(self.latent.to(x.dtype).expand(x.shape[0], -1, -1)), self.kv(x).chunk(2, dim=2)
        x = self.proj(attend(q, k, v, self.heads))[:, 0]
        return x + self.mlp(self.norm(x))


class SigLipVisionTransformer(Tower):
    """Images (B, 3, S, S) to embeddings (B, E)."""

    def __init__(self, cfg: SigLipVisionConfig, embed_dim: int, quick_gelu: bool):
        super().__init__()
        W, heads = cfg.width, cfg.width // cfg.head_width
        if quick_gelu or embed_dim != W:
            raise InputError(f"SigLIP's image tower needs embed_dim {W}, its width, and quick_gelu false")
        self.image_size, self.patch_dropout, self.width = cfg.image_size, cfg.patch_dropout, W
        self.conv1 = nn.Conv2d(3, W, cfg.patch_size, stride=cfg.patch_size)
        self.positional_embedding = nn.Parameter(torch.empty((cfg.image_size // cfg.patch_size) ** 2, W))
        self.blocks = nn.ModuleList(Block(W, heads, cfg.mlp_ratio, quick_gelu) for _ in range(cfg.layers))
        self.ln_post, self.attn_pool = nn.LayerNorm(W), LatentPool(W, heads, cfg.mlp_ratio)
        self.proj = nn.Identity()
        set_kwargs(self, cfg.act_kwargs, {"eps": EPS})

    def features(self, pixel_values: Tensor) -> Tensor:
        check_images(pixel_values, self.image_size)
        x = self.conv1(pixel_values).flatten(2).transpose(1, 2)  # (B, patches, W)
        x = x + self.positional_embedding.to(x.dtype)
        if self.training and self.patch_dropout:  # a random choice of each image's patches
            keep = max(1, round(x.shape[1] * (1 - self.patch_dropout)))
            kept = torch.rand(x.shape[:2], device=x.device).topk(keep, dim=1).indices
            x = x.gather(1, kept[..., None].expand(-1, -1, self.width))
        return self.attn_pool(self.ln_post(self.run_blocks(x, is_causal=False)))

    def init_parameters(self):
        for parameter in (self.positional_embedding, self.attn_pool.latent):
            nn.init.normal_(parameter, std=self.width**-0.5)
        for module in self.attn_pool.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    rows = [  # timm's in the middle, transformers' on the right
        ("{t}conv1.{p}", "{t}trunk.patch_embed.proj.{p}", "{t}embeddings.patch_embedding.{p}"),
        ("{t}positional_embedding", "{t}trunk.pos_embed | one", "{t}embeddings.position_embedding.weight"),
        ("{t}ln_post.{p}", "{t}trunk.norm.{p}", "{t}post_layernorm.{p}"),
        ("{t}attn_pool.latent", "{t}trunk.attn_pool.latent", "{t}head.probe"),
        ("{t}attn_pool.q.{p}", "{t}trunk.attn_pool.q.{p}", "{t}head.attention.in_proj_{p}.q"),  # see split_in_proj
        ("{t}attn_pool.kv.{p}", "{t}trunk.attn_pool.kv.{p}", "{t}head.attention.in_proj_{p}.kv"),
        ("{t}attn_pool.proj.{p}", "{t}trunk.attn_pool.proj.{p}", "{t}head.attention.out_proj.{p}"),
        ("{t}attn_pool.norm.{p}", "{t}trunk.attn_pool.norm.{p}", "{t}head.layernorm.{p}"),
        ("{t}attn_pool.mlp.c_fc.{p}", "{t}trunk.attn_pool.mlp.fc1.{p}", "{t}head.mlp.fc1.{p}"),
        ("{t}attn_pool.mlp.c_proj.{p}", "{t}trunk.attn_pool.mlp.fc2.{p}", "{t}head.mlp.fc2.{p}"),
        *((ours, f"{{t}}trunk.blocks.{{i}}.{timm}.{{p}}", hf) for timm, (ours, _, hf) in zip(TIMM_BLOCK, BLOCK_ROWS)),
    ]


class SigLipTextTransformer(VariantTextTransformer):
    """Token ids (B, L) to embeddings (B, E); shorter rows are padded to the context length, which has a part in it."""

    def key_rows(self) -> list[tuple[str, str, str]]:
        if self.cfg.ls_init_value is not None:
            return super().key_rows()
        return [
            ("{t}token_embedding.weight",) * 2 + ("{t}embeddings.token_embedding.weight",),
            ("{t}positional_embedding",) * 2 + ("{t}embeddings.position_embedding.weight",),
            ("{t}ln_final.{p}",) * 2 + ("{t}final_layer_norm.{p}",),
            ("{t}text_projection.{p}",) * 2 + ("{t}head.{p}",),
            ("logit_bias", "logit_bias | scalar", "logit_bias | scalar"),  # which transformers' CLIPModel has not
            *BLOCK_ROWS,
        ]

    def open_tokenizer(self, folder: str | Path):
        """The fast tokenizer in a folder or a repository. Raises InputError that says what is missing."""
        from transformers import PreTrainedTokenizerFast

        there = [name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
        if Path(folder).is_dir() and not there:
            raise InputError(f"{folder} has no {' or '.join(TOKENIZER_FILES)}: copy the model's tokenizer there")
        return open_tokenizer(folder, PreTrainedTokenizerFast if TOKENIZER_FILES[0] in there else None)


def split_in_proj(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights with the query's third of the pool's matrix apart from keys and values, as in timm."""
    weights, joined = dict(state_dict), ("head.attention.in_proj_weight", "head.attention.in_proj_bias")
    for name in [name for name in weights if name.endswith(joined)]:
        third = len(tensor := weights.pop(name)) // 3
        weights |= {f"{name}.q": tensor[:third], f"{name}.kv": tensor[third:]}
    return weights


def join_in_proj(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_in_proj`."""
    joined = {name: t for name, t in weights.items() if not name.endswith((".q", ".kv"))}
    for name in [name.removesuffix(".q") for name in weights if name.endswith(".q")]:
        joined[name] = torch.cat([weights[f"{name}.q"], weights[f"{name}.kv"]])
    return joined


OPERATIONS["one"] = lambda tensors: [tensors[0][0]], lambda tensors: [tensors[0][None]]  # (1, L, W) and (L, W)
TOWERS.update({SigLipVisionConfig: SigLipVisionTransformer, SigLipTextConfig: SigLipTextTransformer})
IN_OPENCLIP.update((SigLipVisionConfig, SigLipTextConfig))
SIZED_BY_FILE[SigLipVisionConfig] = split_in_proj
TOKENIZER_BESIDE[SigLipTextConfig] = TOKENIZER_FILES
