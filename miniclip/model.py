"""What does CLIP compute?

Two transformers, one for images and one for texts, that end in the same space: an image and its caption should get
nearly the same direction there. Both are stacks of one pre-norm block; they differ in how the sequence is made
(patches, tokens), whether a position may look ahead (images yes, texts no) and which position is read out.

Shape letters: B batch, S image size, P patch size, L sequence length, W width of a tower, H heads, E embedding size.
Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.checkpoint import IMAGE_ROWS, TEXT_ROWS
from miniclip.config import MODELS, MiniClipConfig, TextConfig, VisionConfig
from miniclip.tokenizer import BaseTokenizer, Tokenizer
from miniclip.utils.errors import InputError
from miniclip.utils.model_folder import read_model_folder, write_model_folder
from miniclip.utils.push import PushToHub

MAX_LOGIT_SCALE = math.log(100)  # the paper keeps the scale at 100 or less, "to prevent training instability"


class ClipOutput(NamedTuple):
    """What a forward pass returns: unit-length (B, E) embeddings and the scale (a scalar, 1 / temperature)."""

    image_embeds: Tensor | None
    text_embeds: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None = None  # of models for SigLIP's loss


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with queries, keys and values from one matrix product."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        B, L, W = x.shape
        q, k, v = self.in_proj(x).view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, L, W/H)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, W))


class MLP(nn.Module):
    """Two linear layers, applied to every position alone."""

    def __init__(self, width: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.act = QuickGELU() if quick_gelu else nn.GELU()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """The pre-norm transformer block of both towers."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), quick_gelu)

    # inference/fast.py computes the same with less work as long as nothing here is changed. Change a line, and this
    # code runs in training, evaluation and search, and one line says so (or always, with `train.py --fast false`).
    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), is_causal)
        return x + self.mlp(self.ln_2(x))

    def init_parameters(self, layers: int):
        """Draws the weights of one of a tower's `layers` blocks."""
        width = self.ln_1.normalized_shape[0]
        # Branches add to the residual stream 2 x layers times: their last matrices start smaller by the root of that.
        last = (width * 2 * layers) ** -0.5
        linears = self.attn.in_proj, self.attn.out_proj, self.mlp.c_fc, self.mlp.c_proj
        for linear, std in zip(linears, (width**-0.5, last, (2 * width) ** -0.5, last)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)


class Tower(nn.Module):
    """Base class of an encoder: inputs to features (B, W), and these to embeddings (B, E) by a projection. Yours
    defines the first four attributes; `towers/registry.py` registers it."""

    features: Callable[[Tensor], Tensor]  # a method: pixel values or token ids to what the projection reads, (B, W)
    width: int  # W
    blocks: Sequence[nn.Module]  # the layers, in order, for rates by layer and freezing all but the last ones
    projection_name = "proj"  # the attribute that maps features to embeddings
    rows: list[tuple[str, str, str]] | None = None  # see `key_rows`
    tokenizer: BaseTokenizer | None = None  # of a text tower
    may_skip_parameters = False  # whether `forward` may leave trainable parameters unused, which DDP has to know
    # Functions (tower, features, inputs) -> (B, W) around `features`, innermost first: fast path, pixels, GradCache.
    wrappers: tuple[Callable, ...] = ()
    fixed_norms: tuple[nn.Module, ...] = ()  # BatchNorms that keep their statistics in training too
    checkpoint_every = 0  # every n-th block keeps only its input for the backward pass; 0: none does

    @property
    def projection(self) -> nn.Module:
        return self.get_submodule(self.projection_name)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.features
        for wrapper in self.wrappers:
            features = partial(wrapper, self, features)
        return self.projection(features(inputs))

    def run_blocks(self, x: Tensor, is_causal: bool) -> Tensor:  # (B, L, W) to (B, L, W)
        for number, block in enumerate(self.blocks):
            recompute = self.checkpoint_every and number % self.checkpoint_every == 0 and torch.is_grad_enabled()
            x = checkpoint(block, x, is_causal, use_reentrant=False) if recompute else block(x, is_causal)
        return x

    def train(self, mode: bool = True):
        super().train(mode)
        for norm in self.fixed_norms:
            norm.eval()
        return self

    def checkpoint_activations(self, every: int):
        self.checkpoint_every = every

    def key_rows(self) -> list[tuple[str, str, str]]:
        """The tower's rows of checkpoint.py's table; by default a tensor has the same name everywhere."""
        return self.rows or [("{t}" + name,) * 3 for name in self.state_dict()]

    def init_parameters(self):
        """Draws the weights outside the blocks."""

    def load_pretrained(self):
        """Loads the weights that its section of the config names."""

    def for_inference(self) -> "Tower":
        """The tower, or a copy that computes the same faster and cannot be trained."""
        return self

    def save_files(self, directory: Path):
        """Writes what the tower needs besides weights, its tokenizer, below `tokenizer/` in a folder."""

    def load_files(self, directory: Path):
        """Reads what `save_files` wrote."""


class VisionTransformer(Tower):
    """Images (B, 3, S, S) to embeddings (B, E): cut into patches, read out at the class token."""

    rows = IMAGE_ROWS

    def __init__(self, cfg: VisionConfig, embed_dim: int, quick_gelu: bool):
        super().__init__()
        self.image_size, self.patch_dropout, self.width = cfg.image_size, cfg.patch_dropout, cfg.width
        self.conv1 = nn.Conv2d(3, cfg.width, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(cfg.width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (cfg.image_size // cfg.patch_size) ** 2, cfg.width))
        self.ln_pre = nn.LayerNorm(cfg.width)
        heads = cfg.width // cfg.head_width
        self.blocks = nn.ModuleList(Block(cfg.width, heads, cfg.mlp_ratio, quick_gelu) for _ in range(cfg.layers))
        self.ln_post = nn.LayerNorm(cfg.width)
        self.proj = nn.Linear(cfg.width, embed_dim, bias=False)

    def features(self, pixel_values: Tensor) -> Tensor:
        S = self.image_size
        if pixel_values.shape[1:] != (3, S, S):
            raise InputError(f"images are {tuple(pixel_values.shape)}, not (B, 3, {S}, {S})")
        x = self.embed_patches(self.conv1(pixel_values))
        return self.ln_post(self.run_blocks(x, is_causal=False)[:, 0])

    def embed_patches(self, patches: Tensor) -> Tensor:
        """(B, W, S/P, S/P) patches to the sequence the blocks work on, the class token first: (B, 1 + patches, W)."""
        x = patches.flatten(2).transpose(1, 2)  # (B, patches, W)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)  # (B, 1 + patches, W)
        x = x + self.positional_embedding.to(x.dtype)
        if self.training and self.patch_dropout:  # keeps the class token and a random choice of each image's patches
            B, L, W = x.shape
            keep = max(1, round((L - 1) * (1 - self.patch_dropout)))
            kept = 1 + torch.rand(B, L - 1, device=x.device).topk(keep, dim=1).indices
            x = torch.cat([x[:, :1], x.gather(1, kept[..., None].expand(-1, -1, W))], dim=1)
        return self.ln_pre(x)

    def init_parameters(self):
        for parameter in (self.class_embedding, self.positional_embedding, self.proj.weight):
            nn.init.normal_(parameter, std=self.width**-0.5)


class TextTransformer(Tower):
    """Token ids (B, L), L up to the context length, to embeddings (B, E), read out at the end token. With causal
    attention nothing after the end token reaches it, so padding can be cut off without changing the result."""

    rows = TEXT_ROWS
    projection_name = "text_projection"

    def __init__(self, cfg: TextConfig, embed_dim: int, quick_gelu: bool):
        super().__init__()
        self.width, self.tokenizer = cfg.width, Tokenizer(cfg.context_length)
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.positional_embedding = nn.Parameter(torch.empty(cfg.context_length, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.mlp_ratio, quick_gelu) for _ in range(cfg.layers))
        self.ln_final = nn.LayerNorm(cfg.width)
        self.text_projection = nn.Linear(cfg.width, embed_dim, bias=False)

    def features(self, input_ids: Tensor) -> Tensor:
        x = self.run_blocks(self.embed_tokens(input_ids), is_causal=True)
        end = input_ids.argmax(dim=1)  # the end token has the highest id of the vocabulary
        # Not x[torch.arange(B), end]: a trace would keep B as a constant, and be wrong for other batches.
        return self.ln_final(x.gather(1, end[:, None, None].expand(-1, -1, x.shape[2]))[:, 0])

    def embed_tokens(self, input_ids: Tensor) -> Tensor:  # (B, L) to (B, L, W)
        if input_ids.shape[1] > len(self.positional_embedding):
            raise InputError(f"{input_ids.shape[1]} tokens; the context is {len(self.positional_embedding)}")
        return self.token_embedding(input_ids) + self.positional_embedding[: input_ids.shape[1]]

    def init_parameters(self):
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection.weight, std=self.width**-0.5)


TOWERS: dict[type, type[Tower]] = {VisionConfig: VisionTransformer, TextConfig: TextTransformer}


class MiniClip(nn.Module, PushToHub):
    """A CLIP model: an image tower, a text tower and the learned scale of their similarities."""

    def __new__(cls, config: MiniClipConfig | None = None, *args, **kwargs):
        return super().__new__(MODELS.get(type(config), cls) if cls is MiniClip else cls)  # e.g. one with a decoder

    def __init__(self, config: MiniClipConfig):
        super().__init__()
        self.config = config
        sections = config.vision_cfg, config.text_cfg
        self.visual, self.text = (TOWERS[type(cfg)](cfg, config.embed_dim, config.quick_gelu) for cfg in sections)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.init_parameters()

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """Embeds images (B, 3, S, S), preprocessed, as (B, E); of unit length with `normalize`."""
        embeds = self.visual(pixel_values)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def encode_text(self, input_ids: Tensor, normalize: bool = False) -> Tensor:
        """Embeds token ids (B, L), L up to the context length, as (B, E); of unit length with `normalize`."""
        embeds = self.text(input_ids)
        return F.normalize(embeds, dim=-1) if normalize else embeds

    def forward(self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None) -> ClipOutput:
        """Embeds images, texts or both; None for what is missing."""
        # The scale is read here, not by the loss: DDP wants every parameter used in `forward`. The trainer clamps it.
        image_embeds = None if pixel_values is None else self.encode_image(pixel_values, normalize=True)
        text_embeds = None if input_ids is None else self.encode_text(input_ids, normalize=True)
        return ClipOutput(image_embeds, text_embeds, self.logit_scale.exp(), self.logit_bias)

    def get_logits(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine similarities (images, texts), and their transpose. Softmax over a row gives probabilities."""
        image_embeds, text_embeds, logit_scale, logit_bias = self(pixel_values, input_ids)[:4]
        logits = logit_scale * image_embeds @ text_embeds.T + (0 if logit_bias is None else logit_bias)
        return logits, logits.T

    def activation_checkpointing_enable(self, *, every_n_layers: int = 1, offload: bool = False, **kwargs):
        """Recomputes activations in the backward pass: less memory, a third more work, the same gradients."""
        if offload:
            raise InputError("offloading activations is not supported: remove offload")
        self.visual.checkpoint_activations(every_n_layers)
        self.text.checkpoint_activations(every_n_layers)

    gradient_checkpointing_enable = activation_checkpointing_enable  # the name in older versions of Trainer

    def init_parameters(self):
        """Draws the weights to start training from, with the standard deviations of OpenAI's code."""
        self.visual.init_parameters()
        self.text.init_parameters()
        for tower in (self.visual, self.text):
            blocks = [module for module in tower.modules() if isinstance(module, Block)]
            for block in blocks:
                block.init_parameters(len(blocks))

    def save_pretrained(self, directory: str | Path, state_dict: dict[str, Tensor] | None = None):
        """Writes config, weights and manifest into a folder. What was there stays until all of the new is written."""
        others = self.visual.save_files, self.text.save_files
        write_model_folder(Path(directory), self.config.to_dict(), state_dict or self.state_dict(), others)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "MiniClip":
        """Reads a folder of `save_pretrained`, in evaluation mode. Raises InputError for missing or damaged files."""
        model = read_model_folder(Path(directory), lambda config: cls(MiniClipConfig.from_json(config)))
        model.visual.load_files(Path(directory))
        model.text.load_files(Path(directory))
        return model.eval()
