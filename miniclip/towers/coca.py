"""CoCa: two towers and a decoder that writes captions (Yu et al., arXiv 2205.01917), as OpenCLIP builds them.

    "vision_cfg": {..., "attentional_pool": true}, "text_cfg": {..., "embed_cls": true}, "multimodal_cfg": {...}

256 learned queries read the image tower by attention: the first becomes the image's embedding, the others are image
tokens. A class token behind the caption becomes its embedding, the positions of the caption are text tokens. The
decoder predicts each next word from the text tokens so far and all image tokens."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TopKLogitsWarper, TopPLogitsWarper

from miniclip.checkpoint import BLOCK_ROWS, TEXT_ROWS
from miniclip.config import LARGEST, MODELS, MiniClipConfig, TextConfig, VisionConfig
from miniclip.model import TOWERS, Attention, Block, ClipOutput, MiniClip, TextTransformer, Tower, VisionTransformer
from miniclip.towers.generate import Writer, beam_search, processors, sample
from miniclip.towers.registry import CAPTIONERS, CUSTOM_TEXT, IN_OPENCLIP, attend, check_images, openclip_rows, trimmed
from miniclip.utils.config_files import check, in_range
from miniclip.utils.errors import InputError

GENERATION = "beam_search", "top_p", "top_k"
READ_TWICE = "parallel", "cascade"  # a second pooler for the embedding: of the tower, or of the first pooler's tokens


class CocaImages:
    """Base of the sections of image towers whose tokens the decoder can read."""


@dataclass
class CocaVisionConfig(VisionConfig, CocaImages):
    """The image tower, read by attention."""

    attentional_pool: bool | str = True  # or "parallel" or "cascade", see READ_TWICE; published models have true
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    output_tokens: bool = True

    def problems(self):
        yield from super().problems()
        pool = self.attentional_pool
        yield pool in (True, *READ_TWICE), f"vision_cfg.attentional_pool is {pool!r:.50}, not true, parallel or cascade"
        for name in ("attn_pooler_queries", "attn_pooler_heads"):
            yield 0 < getattr(self, name) <= 4096, f"vision_cfg.{name} is not from 1 to 4096"
        yield self.output_tokens, "vision_cfg.output_tokens is false: CoCa's decoder reads them"


@dataclass
class CocaTextConfig(TextConfig):
    """The text tower, with a class token behind the caption."""

    embed_cls: bool = True
    output_tokens: bool = True
    pad_id: int = 0

    def problems(self):
        yield from super().problems()
        yield self.embed_cls and self.output_tokens, "text_cfg.embed_cls and output_tokens are not both true"
        yield 0 <= self.pad_id < self.vocab_size, "text_cfg.pad_id is not from 0 to vocab_size - 1"


@dataclass
class MultimodalConfig:
    """The decoder."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    attn_pooler_heads: int = 8  # in published configs; nothing reads it, in OpenCLIP neither

    def problems(self):
        yield from in_range("multimodal_cfg.", self, LARGEST)
        yield self.width % self.heads == 0, "multimodal_cfg.width is not a multiple of heads"


@dataclass
class CocaConfig(MiniClipConfig):
    multimodal_cfg: MultimodalConfig = field(default_factory=MultimodalConfig)

    def problems(self):
        vision, text, decoder = self.vision_cfg, self.text_cfg, self.multimodal_cfg
        yield from super().problems()
        yield from decoder.problems()
        towers = isinstance(vision, CocaImages) and isinstance(text, CocaTextConfig)
        yield towers, "multimodal_cfg needs attentional_pool in vision_cfg and embed_cls in text_cfg"
        yield text.width == decoder.width == self.embed_dim, "embed_dim and the widths of text and decoder differ"
        for name in ("context_length", "vocab_size"):
            yield getattr(text, name) == getattr(decoder, name), f"{name} differs in text_cfg and multimodal_cfg"


class TokenTower(Tower):
    """A tower that makes one sequence, of which it reads the features (B, W) and the tokens for the decoder."""

    def features(self, inputs: Tensor) -> Tensor:
        return self.read(self.sequence(inputs))

    def with_tokens(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, E), as `forward` returns them, and tokens (B, N, W), in one forward pass."""
        sequence = self.sequence
        for wrapper in self.wrappers:
            sequence = partial(wrapper, self, sequence)
        x = sequence(inputs)
        return self.projection(self.read(x)), self.tokens(x, inputs)


class AttentionalPooler(nn.Module):
    """Attention of learned queries to all positions: (B, L, W) to (B, queries, E)."""

    def __init__(self, width: int, embed_dim: int, heads: int, queries: int):
        super().__init__()
        if embed_dim % heads:
            raise InputError(f"embed_dim {embed_dim} is not a multiple of attn_pooler_heads {heads}")
        self.query = nn.Parameter(torch.empty(queries, embed_dim))
        self.attn = nn.MultiheadAttention(embed_dim, heads, kdim=width, vdim=width, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(embed_dim), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x, attn = self.ln_k(x), self.attn  # written out: its own forward in fp16 crashes ONNX Runtime
        weights = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
        weights = weights if attn.in_proj_weight is None else attn.in_proj_weight.chunk(3)
        q, k, v = map(F.linear, (self.ln_q(self.query), x, x), weights, attn.in_proj_bias.chunk(3))
        return attn.out_proj(attend(q.expand(x.shape[0], -1, -1), k, v, attn.num_heads))


class CocaVisionTransformer(TokenTower, VisionTransformer):
    """Images (B, 3, S, S) to embeddings (B, E), with tokens (B, queries - 1 or queries, E)."""

    key_rows = openclip_rows

    def __init__(self, cfg: CocaVisionConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg, embed_dim, quick_gelu)
        W, E, heads = cfg.width, embed_dim, cfg.attn_pooler_heads
        if cfg.attentional_pool in READ_TWICE and E != W:
            raise InputError(f"attentional_pool {cfg.attentional_pool} needs embed_dim {W}, the image tower's width")
        self.width, self.cascade = E, cfg.attentional_pool == "cascade"
        self.attn_pool = AttentionalPooler(W, E, heads, cfg.attn_pooler_queries)
        self.attn_pool_contrastive = AttentionalPooler(W, E, heads, 1) if cfg.attentional_pool in READ_TWICE else None
        self.ln_post, self.proj = nn.LayerNorm(E), nn.Linear(E, E, bias=False)

    def sequence(self, pixel_values: Tensor) -> Tensor:  # (B, 1 + tokens, E), what is read as the embedding first
        check_images(pixel_values, self.image_size)
        x = self.run_blocks(self.embed_patches(self.conv1(pixel_values)), is_causal=False)
        if self.attn_pool_contrastive is None:
            return self.ln_post(self.attn_pool(x))
        x = self.ln_post(x)
        tokens = self.attn_pool(x)
        return torch.cat([self.attn_pool_contrastive(tokens if self.cascade else x), tokens], dim=1)

    def read(self, x: Tensor) -> Tensor:
        return x[:, 0]

    def tokens(self, x: Tensor, pixel_values: Tensor) -> Tensor:
        return x[:, 1:]

    def init_parameters(self):
        for parameter in (self.class_embedding, self.positional_embedding, self.proj.weight):
            nn.init.normal_(parameter, std=len(self.class_embedding) ** -0.5)
        for module in self.modules():
            if isinstance(module, AttentionalPooler):
                nn.init.normal_(module.query)


class MaskedAttention(Attention):
    """Attention that takes a mask where model.py's takes `is_causal`."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out_proj(attend(*self.in_proj(x).chunk(3, dim=2), self.heads, mask))


class CocaTextTransformer(TokenTower, TextTransformer):
    """Token ids (B, L) to embeddings (B, E), with tokens (B, L, W). Padding can be cut off without changing either."""

    rows = [*TEXT_ROWS, ("{t}cls_emb",) * 3]

    def __init__(self, cfg: CocaTextConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg, embed_dim, quick_gelu)
        self.cfg = cfg
        self.positional_embedding = nn.Parameter(torch.empty(cfg.context_length + 1, cfg.width))
        self.cls_emb = nn.Parameter(torch.empty(cfg.width))
        for block in self.blocks:
            block.attn = MaskedAttention(cfg.width, cfg.heads)

    def features(self, input_ids: Tensor) -> Tensor:
        return super().features(trimmed(input_ids, self.cfg.pad_id))

    def sequence(self, input_ids: Tensor) -> Tensor:  # (B, L or L + 1, and the class token, W)
        L, room = input_ids.shape[1], self.cfg.context_length
        if L > room:
            raise InputError(f"{L} tokens; the context is {room}")
        # One token of padding is enough, for the class token to see (`mask`); an export needs one length for all.
        padding = room - L if torch.compiler.is_exporting() or torch.jit.is_tracing() else min(1, room - L)
        ids = F.pad(input_ids, (0, padding), value=self.cfg.pad_id)
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        last = (self.cls_emb + self.positional_embedding[room]).expand(x.shape[0], 1, -1)  # wherever padding ends
        return self.run_blocks(torch.cat([x, last], dim=1), self.mask(ids))

    def mask(self, ids: Tensor) -> Tensor:
        """Which positions see which, (B, 1, L + 1, L + 1): those before, but no padding. OpenCLIP's models are trained
        with a mask that is one position late: the first token of padding is seen, and the class token sees itself only
        behind a caption that fills the context."""
        seen = F.pad(ids != self.cfg.pad_id, (1, 0), value=True)
        causal = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=ids.device).tril()
        return (seen[:, None] & causal)[:, None]

    def read(self, x: Tensor) -> Tensor:
        return self.ln_final(x[:, -1])

    def tokens(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return x[:, : input_ids.shape[1]]

    def init_parameters(self):
        super().init_parameters()
        nn.init.normal_(self.cls_emb, std=0.01)


class CrossAttention(Attention):
    """Attention to another sequence, by its keys and values (B, N, W)."""

    def parts(self) -> list[tuple[Tensor, Tensor]]:  # weight and bias, of queries and of keys and values
        sizes = [self.out_proj.in_features, 2 * self.out_proj.in_features]
        return list(zip(self.in_proj.weight.split(sizes), self.in_proj.bias.split(sizes)))

    def keys(self, others: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(others, *self.parts()[1]).chunk(2, dim=2)

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        return self.out_proj(attend(F.linear(x, *self.parts()[0]), *keys, self.heads))


class CrossBlock(Block):
    """A block that attends to another sequence, or to its keys and values."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool):
        super().__init__(width, heads, mlp_ratio, quick_gelu)
        self.attn, self.ln_1_kv = CrossAttention(width, heads), nn.LayerNorm(width)

    def keys(self, others: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn.keys(self.ln_1_kv(others))

    def forward(self, x: Tensor, others: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.ln_1(x), others if isinstance(others, tuple) else self.keys(others))
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """Text tokens (B, L, W) and image tokens (B, N, W) to the logits of each next token (B, L, vocabulary)."""

    checkpoint_every = 0  # see Tower

    def __init__(self, cfg: MultimodalConfig, quick_gelu: bool):
        super().__init__()
        sizes = cfg.width, cfg.heads, 4.0, quick_gelu  # MLPs of other widths are unknown to OpenCLIP too
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(cfg.layers))
        self.cross_attn = nn.ModuleList(CrossBlock(*sizes) for _ in range(cfg.layers))
        self.ln_final = nn.LayerNorm(cfg.width)
        self.text_projection = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        for block in (*self.blocks, *self.cross_attn):
            block.init_parameters(2 * cfg.layers)
        nn.init.normal_(self.text_projection.weight, std=cfg.width**-0.5)

    def forward(self, x: Tensor, image_tokens: Tensor) -> Tensor:
        for number, blocks in enumerate(zip(self.blocks, self.cross_attn)):
            recompute = self.checkpoint_every and number % self.checkpoint_every == 0 and torch.is_grad_enabled()
            for block, argument in zip(blocks, (True, image_tokens)):
                x = checkpoint(block, x, argument, use_reentrant=False) if recompute else block(x, argument)
        return self.text_projection(self.ln_final(x))


def decoder_rows() -> list[tuple[str, str, str]]:
    """The decoder's rows of checkpoint.py's table."""
    rows = [
        ("text_decoder.ln_final.{p}", "text_decoder.ln_final.{p}"),
        ("text_decoder.text_projection.weight", "text_decoder.text_projection | transpose"),
        ("text_decoder.cross_attn.{i}.ln_1_kv.{p}", "text_decoder.cross_attn.{i}.ln_1_kv.{p}"),
    ]
    for places in (("blocks", "resblocks"), ("cross_attn", "cross_attn")):
        for names in BLOCK_ROWS:
            starts = (f"text_decoder.{place}.{{i}}." for place in places)
            rows.append(tuple(name.replace("{b}", start) for name, start in zip(names, starts)))
    return [(ours, theirs, ours) for ours, theirs in rows]  # transformers has no CoCa


class CocaOutput(NamedTuple):
    """A ClipOutput, with the logits (B, L - 1, vocabulary) of the tokens that follow each but the last of a caption."""

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    caption_logits: Tensor


class CoCa(MiniClip):
    """A MiniClip with a decoder. Only the caption loss trains the decoder: `train_captions` prepares for it."""

    predicts_captions = False  # whether `forward` returns a CocaOutput

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        self.text_decoder = Decoder(config.multimodal_cfg, config.quick_gelu).requires_grad_(False)
        self.text.rows = [*self.text.rows, *decoder_rows()]  # the table of names has two towers

    def train_captions(self):
        """Lets the decoder learn, and `forward` return what the caption loss reads."""
        self.predicts_captions = True
        self.text_decoder.requires_grad_(True)

    def forward(self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None) -> ClipOutput | CocaOutput:
        if not self.predicts_captions or pixel_values is None or input_ids is None:
            return super().forward(pixel_values, input_ids)
        image, image_tokens = self.visual.with_tokens(pixel_values)
        text, text_tokens = self.text.with_tokens(input_ids)
        logits = self.text_decoder(text_tokens[:, :-1], image_tokens)
        embeds = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return CocaOutput(*embeds, self.logit_scale.exp(), self.logit_bias, logits)

    def caption_logits(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """For images (B, 3, S, S) and captions (B, L) the logits of the token after each, (B, L, vocabulary)."""
        return self.text_decoder(self.text.with_tokens(input_ids)[1], self.visual.with_tokens(pixel_values)[1])

    @torch.no_grad()
    def generate(
        self, image: Tensor, text: Tensor | None = None, seq_len: int = 30, *, generation_type: str = "beam_search",
        num_beams: int = 6, num_beam_groups: int = 3, temperature: float = 1.0, top_p: float = 0.1, top_k: int = 1,
        min_seq_len: int = 5, repetition_penalty: float = 1.0, fixed_output_length: bool = False,
        sot_token_id: int | None = None, eos_token_id: int | None = None, pad_token_id: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Captions of images (B, 3, S, S), preprocessed, as token ids (B, T) for `tokenizer.decode`, start and end
        included: OpenCLIP's `generate`, with the same result, and its defaults.

        `generation_type` is "beam_search", which keeps `num_beams` / `num_beam_groups` texts, or "top_p" or "top_k",
        which draw each token from the likeliest: those that together have the probability `top_p`, or `top_k` many
        (1: the likeliest, without chance). These can go on from a `text` (B, T). A caption has at least `min_seq_len`
        tokens, T is at most `seq_len`, and exactly that with `fixed_output_length`. Raises InputError for values out of
        range or that do not go together."""
        room = self.config.text_cfg.context_length
        sot = self.text.tokenizer.sot_token_id if sot_token_id is None else sot_token_id
        eos = self.text.tokenizer.eot_token_id if eos_token_id is None else eos_token_id
        pad = self.config.text_cfg.pad_id if pad_token_id is None else pad_token_id
        check([
            (min_seq_len < seq_len <= room, f"seq_len {seq_len} is not above min_seq_len {min_seq_len}, up to {room}"),
            (generation_type in GENERATION, f"generation_type {generation_type!r} is none of {', '.join(GENERATION)}"),
            (num_beam_groups > 0 and num_beams > 0 and num_beams % num_beam_groups == 0,
             f"num_beams {num_beams} is not a multiple of num_beam_groups {num_beam_groups}"),
            (text is None or generation_type != "beam_search", "beam_search cannot go on from a text: use top_k"),
            (temperature > 0, f"temperature {temperature} is not above 0; for no chance use top_k 1"),
            (top_k >= 1 and 0 <= top_p <= 1, f"top_k {top_k} is not 1 or more, or top_p {top_p} not from 0 to 1"),
            (repetition_penalty > 0, f"repetition_penalty {repetition_penalty} is not above 0; 1 is none"),
        ])  # fmt: skip
        next_logits = Writer(self.text, self.text_decoder, self.visual.with_tokens(image)[1])
        rules = partial(processors, eos, min_seq_len, repetition_penalty, image.device)
        if generation_type == "beam_search":
            beams = num_beams // num_beam_groups
            ids = beam_search(next_logits, rules(), len(image), beams, sot, eos, pad, seq_len, image.device)
        else:
            warper = TopPLogitsWarper(top_p) if generation_type == "top_p" else TopKLogitsWarper(top_k)
            ids = torch.full((len(image), 1), sot, device=image.device) if text is None else text
            ids = sample(next_logits, rules(warper), ids, temperature, eos, pad, seq_len)
        return F.pad(ids, (0, seq_len - ids.shape[1] if fixed_output_length else 0), value=pad)

    def activation_checkpointing_enable(self, *, every_n_layers: int = 1, offload: bool = False, **kwargs):
        super().activation_checkpointing_enable(every_n_layers=every_n_layers, offload=offload)
        self.text_decoder.checkpoint_every = every_n_layers


TOWERS.update({CocaVisionConfig: CocaVisionTransformer, CocaTextConfig: CocaTextTransformer})
MODELS[CocaConfig] = CoCa
IN_OPENCLIP.update((CocaVisionConfig, CocaTextConfig))
CUSTOM_TEXT.add(CocaTextConfig)
CAPTIONERS.add(CoCa)
