"""How are the same numbers had in less time?

`model.py` says what CLIP computes; here the same is computed with less work:

    padding    what follows a caption's end token influences nothing: on the CPU the captions of a batch lie end to end
    read-out   one position of the last block is read, so that only this one goes on through its query and MLP
    patches    are cut out and multiplied as one matrix, which a general convolution makes less of
    oneDNN     fp32 matrices are multiplied by oneDNN on processors where `cpu_routes` finds that faster and as exact

`fast_model` makes an inference copy of a model (in fp32, bf16 or int8); `speed_up` lets a model train this way.
"""

import copy
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from miniclip.inference.matmul import (
    Int8Linear,
    OneDnnLinear,
    PatchLinear,
    _onednn_pays,
    matmul_precision,
    patch_product,
)
from miniclip.model import MiniClip, TextTransformer, VisionTransformer
from miniclip.utils.errors import InputError

PRECISIONS = ("fp32", "bf16", "int8")


def image_features(tower: VisionTransformer, pixel_values: Tensor) -> Tensor:
    """What `tower.features(pixel_values)` gives: (B, 3, S, S) to (B, W)."""
    x = tower.embed_patches(tower.conv1(pixel_values))  # (B, L, W)
    B, L, W = x.shape
    ends = torch.arange(0, B * L, L, device=x.device)  # of L positions the first one, the class token, is read
    return tower.ln_post(_blocks(tower, x.reshape(B * L, W), (B, L), ends, is_causal=False))


def _convolve(conv: nn.Conv2d, pixel_values: Tensor) -> Tensor:
    return patch_product(pixel_values, conv.stride[0], lambda patches: F.linear(patches, conv.weight.flatten(1)))


def text_features(tower: TextTransformer, input_ids: Tensor) -> Tensor:
    """What `tower.features(input_ids)` gives: (B, L) to (B, W)."""
    x, (B, L) = tower.embed_tokens(input_ids), input_ids.shape
    x, end = x.reshape(B * L, -1), input_ids.argmax(dim=1)
    ends, kept = torch.arange(B, device=x.device) * L + end, None
    if x.device.type == "cpu":  # elsewhere sizes that change with the batch cost more than they save
        inside = (torch.arange(L) <= end[:, None]).flatten()
        captions, padding = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
        # For every number of rows that is new oneDNN has to write a program: with some padding it is a round one.
        room = -len(captions) % 64
        if room < len(padding):
            kept = torch.cat([captions, padding[:room]])  # (T,)
            ends, x = end.cumsum(0) + torch.arange(B), x[kept]  # where among them the captions end
    return tower.ln_final(_blocks(tower, x, (B, L), ends, True, kept))


FAST = {VisionTransformer: image_features, TextTransformer: text_features}


def _blocks(tower, x: Tensor, shape: tuple[int, int], ends: Tensor, is_causal: bool, kept: Tensor | None = None):
    """All blocks of a tower: rows (T, W) to those that are read out, (B, W).

    The rows are B sequences of up to L (`shape`), end to end. With `kept` (T,) some of the B x L are left out, and
    it says which there are. `ends` (B,) are the rows to read.
    """
    for number, block in enumerate(tower.blocks):
        run = partial(_block, block, shape=shape, is_causal=is_causal, kept=kept)
        if tower.checkpoint_every and number % tower.checkpoint_every == 0 and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        x = run(x, ends=ends if number == len(tower.blocks) - 1 else None)
    return x


def _block(block: nn.Module, x: Tensor, ends: Tensor | None, shape: tuple[int, int], is_causal: bool, kept):
    """`block(x)` for rows (T, W); with `ends`, for those rows alone."""
    (B, L), W = shape, x.shape[1]
    qkv = _linear(block.attn.in_proj, block.ln_1(x))  # (T, 3 W)
    if kept is not None:
        qkv = qkv.new_zeros(B * L, 3 * W).index_copy(0, kept, qkv)
    q, k, v = qkv.view(B, L, 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, W / H)
    if ends is None:
        attended = _attention(q, k, v, is_causal=is_causal).transpose(1, 2).reshape(B * L, W)
        attended = attended if kept is None else attended[kept]
    else:
        position = (ends if kept is None else kept[ends]) % L  # (B,)
        q = q[torch.arange(B, device=x.device), :, position][:, :, None]  # (B, H, 1, W / H)
        before = torch.arange(L, device=x.device) <= position[:, None] if is_causal else None
        mask = None if before is None else before[:, None, None]
        attended, x = _attention(q, k, v, attn_mask=mask).reshape(B, W), x[ends]
    x = _linear(block.attn.out_proj, attended, residual=x)
    hidden = _linear(block.mlp.c_fc, block.ln_2(x), activation=block.mlp.act)
    return _linear(block.mlp.c_proj, hidden, residual=x)


def _linear(layer: nn.Module, x: Tensor, activation: nn.Module | None = None, residual: Tensor | None = None):
    """A linear layer and what follows it, in one go where the layer can do that."""
    if isinstance(layer, OneDnnLinear):
        return layer(x, activation, residual)
    x = layer(x)
    x = x if activation is None else activation(x)
    return x if residual is None else residual + x


def _attention(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
    # With its products through oneDNN, attention is fastest written out; torch's fused one becomes slower by them.
    plain = q.device.type == "cpu" and torch.get_float32_matmul_precision() != "highest"
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **kwargs)


def speed_up(model: MiniClip) -> MiniClip:
    """Makes a model compute by this file's functions from now on, in training too. Weights and results stay. Towers of
    another make than model.py's stay as they are."""
    for tower in (model.visual, model.text):
        if type(tower) in FAST:
            tower.features = partial(FAST[type(tower)], tower)
    if isinstance(model.visual, VisionTransformer):
        model.visual.conv1.forward = partial(_convolve, model.visual.conv1)
    return model


class FastClip(MiniClip):
    """A MiniClip for inference; made by `fast_model`. Called as any other, it neither trains nor saves itself."""

    def __init__(self, model: MiniClip, precision: str, pack: bool):
        nn.Module.__init__(self)
        self.config, self.precision, self.training = model.config, precision, False
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        layer = Int8Linear if precision == "int8" else copy.copy
        if model.logit_scale.device.type == "cpu" and pack and _onednn_pays(precision):
            layer = OneDnnLinear
        towers = (tower.for_inference() for tower in (model.visual, model.text))
        self.visual, self.text = (_rebuilt(tower, self.dtype, layer) for tower in towers)
        self.logit_scale = nn.Parameter(model.logit_scale.detach().float(), requires_grad=False)
        self.logit_bias = model.logit_bias

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """The image tower up to its projection: (B, 3, S, S) to (B, W) float32."""
        with self.inference():
            return self._features(self.visual, pixel_values.to(self.dtype))

    def text_features(self, input_ids: Tensor) -> Tensor:
        """The text tower up to its projection: (B, L) to (B, W) float32."""
        with self.inference():
            return self._features(self.text, input_ids)

    def _features(self, tower: nn.Module, inputs: Tensor) -> Tensor:
        return FAST.get(type(tower), type(tower).features)(tower, inputs).float()

    def project(self, features: Tensor, kind: str, normalize: bool = True) -> Tensor:
        """The last step, from features (B, W) of a kind, "image" or "text", to embeddings (B, E) float32."""
        projection = self.visual.proj if kind == "image" else self.text.text_projection
        with self.inference():
            embeds = projection(features.to(self.dtype)).float()
            return F.normalize(embeds, dim=-1) if normalize else embeds

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """As MiniClip's; float32 whatever the precision within."""
        return self.project(self.image_features(pixel_values), "image", normalize)

    def encode_text(self, input_ids: Tensor, normalize: bool = False) -> Tensor:
        """As MiniClip's; float32 whatever the precision within."""
        return self.project(self.text_features(input_ids), "text", normalize)

    @contextmanager
    def inference(self):
        """Without gradients, and in the precision chosen whatever is set around it, as in the midst of training."""
        with (
            torch.inference_mode(),
            torch.autocast(self.logit_scale.device.type, enabled=False),
            matmul_precision("highest"),
        ):
            yield

    def train(self, mode: bool = True):
        if mode:
            raise InputError("a model loaded with a precision is for inference: load it without, to train it")
        return self

    def save_pretrained(self, directory, state_dict=None):
        raise InputError("a model loaded with a precision cannot be saved: load it without")


def fast_model(model: MiniClip, precision: str = "fp32", pack: bool = True) -> FastClip:
    """A copy of a model for inference, on the same device: the same embeddings (fp32) or nearly (bf16, int8), sooner.

    Later changes of the model's weights do not reach it. It takes half a second for a large model on the CPU; without
    `pack` no time, but then the weights stay as they lie. Raises InputError for an unknown precision, and for int8
    elsewhere than on the CPU.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if precision == "int8" and model.logit_scale.device.type != "cpu":
        raise InputError(f"precision int8 is for the CPU; on {model.logit_scale.device} take bf16")
    return FastClip(model, precision, pack)


def cosine_to_fp32(fast: FastClip, model: MiniClip, pixel_values: Tensor, input_ids: Tensor) -> tuple[float, float]:
    """The smallest cosine between what a fast model gives and what the model it was made of gives, computed as
    model.py says: of the images (B, 3, S, S), and of the texts (B, L)."""
    with torch.inference_mode():
        exact = model.encode_image(pixel_values, normalize=True), model.encode_text(input_ids, normalize=True)
    ours = fast.encode_image(pixel_values, normalize=True), fast.encode_text(input_ids, normalize=True)
    return tuple((a * b).sum(dim=1).min().item() for a, b in zip(exact, ours))


def _rebuilt(module: nn.Module, dtype: torch.dtype, layer) -> nn.Module:
    """A copy of a tree of modules with other linear layers, which shares what it can with the original."""
    twin = copy.copy(module)
    for name in ("forward", "features"):  # what `speed_up` or gradient checkpointing put there
        twin.__dict__.pop(name, None)
    twin.training = False
    kept = torch.float32 if isinstance(module, _BatchNorm) else dtype  # its statistics are in fp32 in any case
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to(kept), requires_grad=False)
        for name, p in module._parameters.items()
    }
    if type(module) is nn.Linear:  # and no kind of its own, whose weights somebody else may read
        return layer(twin)
    children = ((name, child) for name, child in module._modules.items() if child is not None)
    twin._modules = dict(module._modules) | {name: _rebuilt(child, dtype, layer) for name, child in children}
    if isinstance(module, VisionTransformer):
        twin._modules["conv1"] = PatchLinear(twin._modules["conv1"], layer)
    return twin
