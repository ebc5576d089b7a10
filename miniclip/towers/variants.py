"""CLIP's two towers with OpenCLIP's other fields: CLIPA's pooling (Li et al., arXiv 2305.07017), MetaCLIP 2's end
token, a text tower without causal mask, layer scale, other tokenizers.

    "vision_cfg": {..., "no_ln_pre": true, "pool_type": "avg"}, "text_cfg": {..., "no_causal_mask": true}

These are the fields of published models with these towers; any other is refused by its name."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import TextConfig, VisionConfig
from miniclip.model import TOWERS, Block, TextTransformer, Tower, VisionTransformer
from miniclip.tokenizer import BaseTokenizer
from miniclip.towers import AS_IN_MODEL
from miniclip.towers.hf_config import open_tokenizer
from miniclip.towers.hf_tokenizer import HfTokenizer, tokenizer_folder
from miniclip.towers.packages import source
from miniclip.towers.registry import IN_OPENCLIP, check_images, openclip_rows
from miniclip.utils.errors import InputError
from miniclip.utils.files import replacing


def only_keys(kind: str, field: str, given: dict | None, keys: tuple[str, ...]):
    """For `check`: an object in a section has no other keys than these."""
    others = sorted(map(str, set(given or {}) - set(keys)))
    yield not others, f"{kind}.{field} has {', '.join(others)}, and only {', '.join(keys)} is supported"


KWARGS = {  # what `set_kwargs` takes: a field's only key, a test of its value, and the test in words
    "act_kwargs": ("approximate", lambda value: value in ("none", "tanh"), "none or tanh"),
    "norm_kwargs": ("eps", lambda value: type(value) is float and 0 < value < 1, "a number between 0 and 1"),
}


def right_kwargs(kind: str, **fields: dict | None):
    """For `check`: the fields `act_kwargs` and `norm_kwargs` of a section."""
    for field, given in fields.items():
        key, fits, values = KWARGS[field]
        yield from only_keys(kind, field, given, (key,))
        if given and key in given:
            yield fits(given[key]), f"{kind}.{field}: {key} is {given[key]!r:.50}, not {values}"


@dataclass
class VariantVisionConfig(VisionConfig):
    """The image tower, with OpenCLIP's other fields."""

    ls_init_value: float | None = None  # layer scale: what each branch of a block is multiplied with at the start
    no_ln_pre: bool = False  # no norm before the blocks
    pool_type: Literal["tok", "avg"] = "tok"  # read the class token, or the mean of the patches
    final_ln_after_pool: bool = False  # the last norm after the mean instead of before
    act_kwargs: dict | None = None  # {"approximate": "tanh"}: GELU by the hyperbolic tangent
    norm_kwargs: dict | None = None  # {"eps": 1e-6}: of the norms

    def problems(self):
        yield from super().problems()
        yield from right_kwargs("vision_cfg", act_kwargs=self.act_kwargs, norm_kwargs=self.norm_kwargs)


@dataclass
class VariantTextConfig(TextConfig):
    """The text tower, with OpenCLIP's other fields."""

    ls_init_value: float | None = None
    no_causal_mask: bool = False  # every position sees all others, padding included
    pool_type: Literal["argmax", "first", "last", "eos"] = "argmax"  # the position that is read
    eos_id: int = 2  # of pool_type eos: the first position with this id
    pad_id: int = 0  # of padding, where the tokenizer does not say it
    token_dropout: float = 0.0  # share of tokens hidden in training, not the first or the end (Iyyer et al., ACL 2015)
    proj_bias: bool = False
    act_kwargs: dict | None = None
    norm_kwargs: dict | None = None
    hf_tokenizer_name: str | None = None  # a folder, or a name on the hub; CLIP's own without
    tokenizer_kwargs: dict | None = None  # {"strip_sep_token": true}: the token at the end becomes 0
    tokenizer_options = ("strip_sep_token",)  # not a field: the keys of tokenizer_kwargs

    def problems(self):
        yield from super().problems()
        yield from right_kwargs("text_cfg", act_kwargs=self.act_kwargs, norm_kwargs=self.norm_kwargs)
        yield from only_keys("text_cfg", "tokenizer_kwargs", self.tokenizer_kwargs, self.tokenizer_options)
        yield self.hf_tokenizer_name or not self.tokenizer_kwargs, "text_cfg.tokenizer_kwargs needs hf_tokenizer_name"
        yield 0 <= self.token_dropout < 1, "text_cfg.token_dropout is not in [0, 1)"
        needs_end = self.pool_type == "argmax" or not self.token_dropout
        yield needs_end, "text_cfg.token_dropout needs pool_type argmax, whose end token is read and stays"


class LayerScale(nn.Module):
    def __init__(self, width: int, start: float):
        super().__init__()
        self.start, self.gamma = start, nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ScaledBlock(Block):
    """A block whose two branches are scaled by channel (CaiT: Touvron et al., arXiv 2103.17239)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool, start: float):
        super().__init__(width, heads, mlp_ratio, quick_gelu)
        self.ls_1, self.ls_2 = LayerScale(width, start), LayerScale(width, start)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), is_causal))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def _adapt(tower: Tower, cfg: VariantVisionConfig | VariantTextConfig, heads: int, quick_gelu: bool):
    """Gives a tower of model.py the blocks, activation and norms of its config."""
    if cfg.ls_init_value is not None:
        sizes = cfg.width, heads, cfg.mlp_ratio, quick_gelu, cfg.ls_init_value
        tower.blocks = nn.ModuleList(ScaledBlock(*sizes) for _ in range(cfg.layers))
    if cfg.act_kwargs and quick_gelu:
        raise InputError("act_kwargs are those of GELU, and quick_gelu is true: remove one of them")
    set_kwargs(tower, cfg.act_kwargs, cfg.norm_kwargs)


def set_kwargs(tower: Tower, act_kwargs: dict | None, norm_kwargs: dict | None):
    """Gives a tower the form of GELU in `act_kwargs` and the eps in `norm_kwargs`, OpenCLIP's fields."""
    for module in tower.modules():
        if isinstance(module, nn.GELU) and act_kwargs:
            module.approximate = act_kwargs["approximate"]
        if isinstance(module, nn.LayerNorm) and norm_kwargs:
            module.eps = norm_kwargs["eps"]


class VariantVisionTransformer(VisionTransformer):
    key_rows = openclip_rows

    def __init__(self, cfg: VariantVisionConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg, embed_dim, quick_gelu)
        self.pool_type, self.final_ln_after_pool = cfg.pool_type, cfg.final_ln_after_pool
        if cfg.no_ln_pre:
            self.ln_pre = nn.Identity()
        _adapt(self, cfg, cfg.width // cfg.head_width, quick_gelu)

    def features(self, pixel_values: Tensor) -> Tensor:
        if self.pool_type == "tok":
            return super().features(pixel_values)
        check_images(pixel_values, self.image_size)
        x = self.run_blocks(self.embed_patches(self.conv1(pixel_values)), is_causal=False)[:, 1:]
        return self.ln_post(x.mean(dim=1)) if self.final_ln_after_pool else self.ln_post(x).mean(dim=1)


class VariantTextTransformer(TextTransformer):
    def __init__(self, cfg: VariantTextConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg, embed_dim, quick_gelu)
        self.cfg, self.token_dropout = cfg, cfg.token_dropout
        if cfg.hf_tokenizer_name:
            del self.tokenizer  # CLIP's
        if cfg.proj_bias:
            self.text_projection = nn.Linear(cfg.width, embed_dim)
        self.as_clips = cfg.pool_type == "argmax" and not cfg.no_causal_mask
        _adapt(self, cfg, cfg.heads, quick_gelu)

    def features(self, input_ids: Tensor) -> Tensor:
        cfg = self.cfg
        if self.as_clips:
            return super().features(input_ids)
        if cfg.no_causal_mask or cfg.pool_type == "last":  # padding, which a batch may lack, has a part in the result
            unread = "tokenizer" not in vars(self) and input_ids.shape[1] >= cfg.context_length  # nor is it needed
            padding = cfg.pad_id if unread else self.tokenizer.pad_token_id
            input_ids = F.pad(input_ids, (0, max(0, cfg.context_length - input_ids.shape[1])), value=padding)
        x = self.run_blocks(self.embed_tokens(input_ids), is_causal=not cfg.no_causal_mask)
        if cfg.pool_type in ("first", "last"):
            return self.ln_final(x[:, 0 if cfg.pool_type == "first" else -1])
        end = (input_ids if cfg.pool_type == "argmax" else (input_ids == cfg.eos_id).int()).argmax(dim=1)
        return self.ln_final(x.gather(1, end[:, None, None].expand(-1, -1, x.shape[2]))[:, 0])

    def embed_tokens(self, input_ids: Tensor) -> Tensor:  # a hidden token is a zero, its place included
        x, share = super().embed_tokens(input_ids), self.token_dropout
        if self.training and share:
            seen = torch.rand(input_ids.shape, device=x.device) >= share
            # The first position sees no other: as a zero it would meet norms of zeros, whose gradients are huge.
            seen[:, 0] = True
            x = x * (seen | (input_ids == input_ids.amax(dim=1, keepdim=True)))[:, :, None]
        return x

    def init_parameters(self):
        super().init_parameters()
        if self.cfg.proj_bias:
            nn.init.zeros_(self.text_projection.bias)

    def key_rows(self) -> list[tuple[str, str, str]]:  # with a bias the projection is a layer in OpenCLIP too
        rows = openclip_rows(self)
        return [(a, a if self.cfg.proj_bias and "proj" in a and "blocks" not in a else b, c) for a, b, c in rows]

    @cached_property
    def tokenizer(self) -> BaseTokenizer:
        """CLIP's tokenizer, or the one that the config names. Raises InputError if that cannot be read."""
        return self.read_tokenizer(source(self.cfg.hf_tokenizer_name))

    def read_tokenizer(self, folder: str | Path) -> HfTokenizer:
        tokenizer = self.open_tokenizer(folder)
        if tokenizer.pad_token_id is None or len(tokenizer) > self.cfg.vocab_size:
            sizes = f"{len(tokenizer)} words and padding id {tokenizer.pad_token_id}"
            raise InputError(f"the tokenizer {folder} has {sizes}, the text tower room for {self.cfg.vocab_size}")
        options = self.cfg.tokenizer_kwargs or {}
        kind = StrippedTokenizer if options.get("strip_sep_token") else HfTokenizer
        return kind(tokenizer, self.cfg.context_length, options.get("clean", "whitespace"))

    open_tokenizer = staticmethod(open_tokenizer)

    def save_files(self, directory: Path):
        if self.cfg.hf_tokenizer_name:
            with replacing(directory / "tokenizer") as scratch:
                self.tokenizer.tokenizer.save_pretrained(scratch)

    def load_files(self, directory: Path):
        if self.cfg.hf_tokenizer_name:
            self.tokenizer = self.read_tokenizer(tokenizer_folder(directory))


class StrippedTokenizer(HfTokenizer):
    """A tokenizer from transformers whose separator, at the end of a caption, is written as 0: CLIPA's."""

    def rows(self, texts: list[str], length: int) -> list[list[int]]:
        end = self.tokenizer.sep_token_id
        return [[0 if i == end else i for i in row] for row in super().rows(texts, length)]

    def fast(self):
        raise InputError("CLIPA's tokenizer, whose last token becomes 0, has no fast form, which tokenizer.json needs")

    def fingerprint(self) -> str:
        return "stripped " + super().fingerprint()


TOWERS.update({VariantVisionConfig: VariantVisionTransformer, VariantTextConfig: VariantTextTransformer})
IN_OPENCLIP.update((VariantVisionConfig, VariantTextConfig))
AS_IN_MODEL[VariantVisionTransformer] = lambda tower: tower.pool_type == "tok" and type(tower.blocks[0]) is Block
AS_IN_MODEL[VariantTextTransformer] = lambda tower: tower.as_clips and type(tower.blocks[0]) is Block
