"""How are the same numbers had in less time?

`model.py` says what CLIP computes; here the same is computed with less work:

    padding    what follows a caption's end token influences nothing: on the CPU the captions of a batch lie end to end
    read-out   one position of the last block is read, so that only this one goes on through its query and MLP
    patches    are cut out and multiplied as one matrix, which a general convolution makes less of
    oneDNN     fp32 matrices are multiplied by oneDNN on processors where `cpu_routes` finds that faster and as exact

`fast_model` makes an inference copy of a model (in fp32, bf16 or int8); `speed_up` lets a model train this way.
"""

import copy
import ctypes
import hashlib
import json
import os
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from miniclip.config import InputError
from miniclip.files import user_cache
from miniclip.model import MiniClip, TextTransformer, VisionTransformer
from miniclip.record import processor

PRECISIONS = ("fp32", "bf16", "int8")


def image_features(tower: VisionTransformer, pixel_values: Tensor) -> Tensor:
    """What `tower.features(pixel_values)` gives: (B, 3, S, S) to (B, W)."""
    x = tower.embed_patches(pixel_values)  # (B, L, W)
    B, L, W = x.shape
    ends = torch.arange(0, B * L, L, device=x.device)  # of L positions the first one, the class token, is read
    return tower.ln_post(_blocks(tower.blocks, x.reshape(B * L, W), (B, L), ends, is_causal=False))


def patch_product(pixel_values: Tensor, patch_size: int, linear) -> Tensor:
    """What a convolution with as large a stride as its kernel gives: (B, 3, S, S) to (B, W, S / P, S / P), by a linear
    layer from 3 x P x P to W."""
    B, C, S, _ = pixel_values.shape
    side, P = S // patch_size, patch_size
    patches = pixel_values.view(B, C, side, P, side, P).permute(0, 2, 4, 1, 3, 5).reshape(B * side * side, C * P * P)
    return linear(patches).view(B, side * side, -1).transpose(1, 2).unflatten(2, (side, side))


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
    return tower.ln_final(_blocks(tower.blocks, x, (B, L), ends, True, kept))


FAST = {VisionTransformer: image_features, TextTransformer: text_features}


def _blocks(blocks, x: Tensor, shape: tuple[int, int], ends: Tensor, is_causal: bool, kept: Tensor | None = None):
    """All blocks of a tower: rows (T, W) to those that are read out, (B, W).

    The rows are B sequences of up to L (`shape`), end to end. With `kept` (T,) some of the B x L are left out, and
    it says which there are. `ends` (B,) are the rows to read.
    """
    for number, block in enumerate(blocks, 1):
        run = partial(_block, block, shape=shape, is_causal=is_causal, kept=kept)
        if "forward" in vars(block) and torch.is_grad_enabled():  # put there by gradient_checkpointing_enable
            run = partial(checkpoint, run, use_reentrant=False)
        x = run(x, ends=ends if number == len(blocks) else None)
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


class Route(NamedTuple):
    """One way to multiply fp32 matrices on this processor, and what `measure_routes` found."""

    used: bool
    speedup: float  # over torch's default
    error: float  # largest difference from the product in float64, over the largest number in that


@cache
def cpu_routes() -> dict[str, Route]:
    """Which way of multiplying fp32 matrices is fast and exact on this processor, as `measure_routes` found when it
    was first asked. That is kept in the user's cache: a busy moment may find otherwise, and the same training would
    come to other numbers in their last bits."""
    about = f"{processor()} {torch.__version__} {torch.get_num_threads()}"
    path = user_cache() / f"products-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
    damaged = False
    try:
        return _read_routes(path)
    except OSError:  # nobody has asked yet
        pass
    except (ValueError, TypeError, KeyError):
        damaged = True
    routes = measure_routes()
    try:
        if damaged:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{os.getpid()}.{path.name}")
        scratch.write_text(json.dumps({"about": about, "routes": routes}, indent=2) + "\n")
        try:
            os.link(scratch, path)  # of processes that start together the first one decides
        except FileExistsError:
            pass
        finally:
            scratch.unlink()
    except OSError:
        pass
    try:
        return _read_routes(path)
    except (OSError, ValueError, TypeError, KeyError):  # no such folder can be written to
        return routes


def _read_routes(path: Path) -> dict[str, Route]:
    return {way: Route(*values) for way, values in json.loads(path.read_text())["routes"].items()}


def measure_routes() -> dict[str, Route]:
    """Measures, in about 0.1 s, which way of multiplying fp32 matrices is fast and exact here.

    "default" is torch's own. "medium" lets torch take oneDNN, in training too, by a switch that also permits rounding
    to bf16: some processors go on computing in fp32, others, with matrix units, do round. "packed" is oneDNN in
    strict fp32 with weights laid out for it, for inference. A way is used where it is 1.2 times as fast as the
    default or more, and its error at most four times as large; that of bf16 would be a thousand times.
    """
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(512, 2048)
    linear.weight.data, x = (torch.randn(rows, 512, generator=draw) for rows in (2048, 256))
    linear.bias.data.zero_()
    ways = {"default": linear}
    if torch.backends.mkldnn.is_available():
        ways |= {"medium": linear, "packed": OneDnnLinear(linear)}
    seconds, errors = {way: [] for way in ways}, {}
    with torch.inference_mode():
        exact = x.double() @ linear.weight.double().T
        for _ in range(3):  # in turn, so that a busy moment does not count against one alone
            for way, multiply in ways.items():
                with matmul_precision("medium" if way == "medium" else "highest"):
                    multiply(x)  # the first time of a size sets up the product
                    start = time.perf_counter()
                    product = multiply(x)
                    seconds[way].append(time.perf_counter() - start)
                errors[way] = ((product - exact).abs().max() / exact.abs().max()).item()
    speedup = {way: min(seconds["default"]) / min(seconds[way]) for way in ways}
    return {
        way: Route(speedup[way] >= 1.2 and errors[way] <= 4 * errors["default"], speedup[way], errors[way])
        for way in ways
    }


@contextmanager
def matmul_precision(precision: str):
    """Within it `torch.set_float32_matmul_precision` is set so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def describe(device: str | torch.device) -> str:
    """One line on how fp32 matrices are multiplied in training."""
    if torch.device(device).type != "cpu" or "medium" not in cpu_routes():
        return "fp32 products as torch makes them"
    default, onednn = cpu_routes()["default"], cpu_routes()["medium"]
    return (
        f"fp32 products {'through oneDNN' if onednn.used else 'as torch makes them; oneDNN would be'}"
        f" ({onednn.speedup:.1f} times as fast as torch's own, error {onednn.error:.0e} against {default.error:.0e})"
    )


def arithmetic(device: str | torch.device) -> str:
    """How fp32 products are made in training, in a word."""
    usable = torch.device(device).type == "cpu" and "medium" in cpu_routes() and cpu_routes()["medium"].used
    return "oneDNN" if usable else "torch"


def fast_arithmetic(device: str | torch.device):
    """A context in which fp32 products take this processor's faster exact way. On other devices it does nothing."""
    return matmul_precision("medium") if arithmetic(device) == "oneDNN" else nullcontext()


def keep_freed_memory():
    """Has the C library keep large blocks of memory that are freed, for the whole process from now on. Otherwise they
    go back to the system, which clears them page by page when the next step wants them again: a tenth to a third of a
    training step on the CPU, and two thirds of EfficientNet-Lite0's time. For Linux's glibc; elsewhere nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: which stays as large as it was


def return_freed_memory():
    """Gives all that was kept back to the system, once."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def speed_up(model: MiniClip) -> MiniClip:
    """Makes a model compute by this file's functions from now on, in training too. Weights and results stay. Towers of
    another make than model.py's stay as they are."""
    for tower in (model.visual, model.text):
        if type(tower) in FAST:
            tower.features = partial(FAST[type(tower)], tower)
    if isinstance(model.visual, VisionTransformer):
        model.visual.conv1.forward = partial(_convolve, model.visual.conv1)
    return model


class OneDnnLinear(nn.Module):
    """A linear layer for inference whose weights lie in the order that oneDNN wants, in the precision they have. The
    activation and the sum with the residual are made while the product is still in the processor's cache."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight), linear.bias

    def forward(self, x: Tensor, activation: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return product.binary(x, residual, self.weight, self.bias, "add")
        if type(activation) is nn.GELU:
            return product(x, self.weight, self.bias, "gelu", [], activation.approximate)
        x = product(x, self.weight, self.bias, "none", [], "")
        return x if activation is None else activation(x)


class Int8Linear(nn.Module):
    """A linear layer for inference in 8-bit integers: each row of the weights and each row of the input has its own
    scale, that of the input found on the fly (dynamic quantisation). A quarter of the memory."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(dim=1).clamp_min(1e-12) / 127  # (out,)
        self.weight = (linear.weight / self.scale[:, None]).round().to(torch.int8).T  # (in, out)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        product = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight).to(x.dtype)
        product = product.mul_(scale).mul_(self.scale)
        product = product if self.bias is None else product.add_(self.bias)
        return product.view(*x.shape[:-1], -1)


class PatchLinear(nn.Module):
    """The image tower's convolution for inference, by one of the layers above."""

    def __init__(self, conv: nn.Conv2d, layer):
        super().__init__()
        self.patch_size = conv.stride[0]
        linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=False, device="meta")
        linear.weight = nn.Parameter(conv.weight.flatten(1), requires_grad=False)
        self.linear = layer(linear)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return patch_product(pixel_values, self.patch_size, self.linear)


class FastClip(MiniClip):
    """A MiniClip for inference; made by `fast_model`. Called as any other, it neither trains nor saves itself."""

    def __init__(self, model: MiniClip, precision: str, pack: bool):
        nn.Module.__init__(self)
        self.config, self.precision, self.training = model.config, precision, False
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        layer = Int8Linear if precision == "int8" else copy.copy
        if model.logit_scale.device.type == "cpu" and pack and _onednn_pays(precision):
            layer = OneDnnLinear
        towers = (getattr(tower, "folded", lambda tower=tower: tower)() for tower in (model.visual, model.text))
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


def _onednn_pays(precision: str) -> bool:
    if precision == "bf16":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return precision == "fp32" and "packed" in cpu_routes() and cpu_routes()["packed"].used


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
