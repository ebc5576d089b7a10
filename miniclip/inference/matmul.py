"""Matrix products in fp32, bf16 and int8: oneDNN where it is faster and as exact, and the layers that use it."""

import copy
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from miniclip.utils.files import replacing, user_cache
from miniclip.utils.machine import processor


class Route(NamedTuple):
    """A way to multiply fp32 matrices on this processor, as `measure_routes` found it."""

    used: bool
    speedup: float  # over torch's default
    error: float  # largest difference from the product in float64, over the largest number in that


@cache
def cpu_routes() -> dict[str, Route]:
    """What `measure_routes` found here the first time: another result would change the last bits of a training run."""
    about = f"{processor()} {torch.__version__} {torch.get_num_threads()} with bf16"
    return remembered("products", "routes", about, Route, measure_routes)


def remembered(name: str, key: str, about: str, kind: type[tuple], measure: Callable[[], dict]) -> dict:
    """What `measure` found here the first time, `kind`s by name, kept in the user's cache for the same `about`."""
    path = user_cache() / f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"

    def kept() -> dict:
        return {way: kind(*values) for way, values in json.loads(path.read_text())[key].items()}

    with suppress(OSError):  # not measured yet
        try:
            return kept()
        except (ValueError, TypeError, KeyError):  # damaged
            path.unlink()
    found = measure()
    with suppress(OSError):  # without a folder to write to they are measured each time
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, first_wins=True) as scratch:  # all processes that start together use the same ones
            scratch.write_text(json.dumps({"about": about, key: found}, indent=2) + "\n")
        return kept()
    return found


def measure_routes() -> dict[str, Route]:
    """Measures in about 0.1 s how fast and how exact each way of multiplying fp32 matrices is on this processor.

    "default" is torch's own. "medium" makes torch use oneDNN, in training too, but permits rounding to bf16, which
    processors with matrix units do. "packed" is oneDNN in strict fp32 with weights laid out for it, for inference. A
    way is used if it is at least 1.2 times as fast as the default and its error at most four times as large: rounding
    to bf16 makes it a thousand times as large. "bf16" is measured only to be suggested (`suggest_bf16`)."""
    draw, linear = torch.Generator().manual_seed(0), nn.Linear(512, 2048)
    linear.weight.data, x = (torch.randn(rows, 512, generator=draw) for rows in (2048, 256))
    linear.bias.data.zero_()
    ways = {"default": linear}
    if torch.backends.mkldnn.is_available():
        ways |= {"medium": linear, "packed": OneDnnLinear(linear)}
    if packs("bf16"):
        rounded = OneDnnLinear(copy.deepcopy(linear).bfloat16())
        ways["bf16"] = lambda x: rounded(x.bfloat16())
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
    return {way: Route(s >= 1.2 and errors[way] <= 4 * errors["default"], s, errors[way]) for way, s in speedup.items()}


def pays(way: str) -> bool:
    return way in cpu_routes() and cpu_routes()[way].used


def packs(precision: str) -> bool:
    """Whether an inference copy's weights are laid out for oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    ways = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "int8": torch.cpu._is_vnni_supported}
    return ways.get(precision, lambda: pays("packed"))()


@contextmanager
def matmul_precision(precision: str):
    """A context with the precision of fp32 products that torch.set_float32_matmul_precision gives. Trainer sets it by
    the newer of torch's two ways (--tf32, --torch_compile), after which reading it by the older one raises an error."""
    with kept(torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) as (_, before):
        try:
            torch.set_float32_matmul_precision(precision)
            yield
        finally:
            torch.set_float32_matmul_precision({"tf32": "high", "bf16": "medium"}.get(before, "highest"))


@contextmanager
def full_precision():
    """A context in which fp32 products, also those of convolutions, are not rounded to TF32 or bf16."""
    layers = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    with matmul_precision("highest"), kept(*layers) as (before, _):
        try:
            torch.backends.cudnn.allow_tf32 = False
            for layer in layers:
                layer.fp32_precision = "ieee"  # not what torch.backends.fp32_precision says
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before == "tf32"


@contextmanager
def kept(*settings):
    """Gives the fp32_precision of parts of torch.backends, and restores it."""
    before = [setting.fp32_precision for setting in settings]
    try:
        yield before
    finally:
        for setting, precision in zip(settings, before):  # "none": as torch.backends.fp32_precision says
            setting.fp32_precision = "none" if precision == torch.backends.fp32_precision else precision


def rounds(device_type: str) -> bool:
    """Whether fp32 products of matrices may be rounded, to TF32 or bf16."""
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("tf32", "bf16")


def describe(device: str | torch.device) -> str:
    """One line on how fp32 matrices are multiplied in training."""
    routes = cpu_routes() if torch.device(device).type == "cpu" else {}
    if "medium" not in routes:
        return "fp32 products: torch's default"
    (used, speedup, error), default = routes["medium"], routes["default"].error
    choice = "oneDNN, not torch's default (" if used else "torch's default (oneDNN does not pay: "
    return f"fp32 products: {choice}{speedup:.1f} times as fast, with an error of {error:.0e} instead of {default:.0e})"


def arithmetic(device: str | torch.device) -> str:
    """The library that multiplies fp32 matrices in training."""
    return "oneDNN" if torch.device(device).type == "cpu" and pays("medium") else "torch"


@contextmanager
def fast_arithmetic(device: str | torch.device):
    """A context in which the CPU multiplies fp32 matrices by oneDNN, if that is faster and as exact. torch's attention
    then takes its steps one by one: what fuses them would call oneDNN for each small part."""
    ways = (matmul_precision("medium"), sdpa_kernel(SDPBackend.MATH)) if arithmetic(device) == "oneDNN" else ()
    with ExitStack() as stack:
        yield [*map(stack.enter_context, ways)]


class OneDnnLinear(nn.Module):
    """A linear layer for inference with weights laid out for oneDNN, which fuses the activation or the residual. They
    are laid out when they are first used: a query in words never needs the image tower's."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), linear.bias

    def forward(self, x: Tensor, activation: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
        product, weight = torch.ops.mkldnn._linear_pointwise, self.weight
        if not weight.is_mkldnn:
            weight = self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        if residual is not None:
            return product.binary(x, residual, weight, self.bias, "add")
        if type(activation) is nn.GELU:
            return product(x, weight, self.bias, "gelu", [], activation.approximate)
        x = product(x, weight, self.bias, "none", [], "")
        return x if activation is None else activation(x)

    def __deepcopy__(self, memo: dict) -> nn.Module:  # with the same weight, since oneDNN's layout cannot be copied
        twin, memo[id(self.weight)] = copy.copy(self), self.weight
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


class Int8Linear(nn.Module):
    """A linear layer for inference in 8-bit integers, (..., in) to (..., out): weights and input have a scale a row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = _to_int8(linear.weight.float())
        self.one_dnn, self.scale, self.bias = packs("int8"), scale.flatten(), linear.bias  # (out,), (out,)
        self.zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None) if self.one_dnn else weight.T

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _to_int8(x.reshape(-1, x.shape[-1]))
        if self.one_dnn:
            rows = rows.view(torch.uint8).bitwise_xor_(128)  # oneDNN's integers are unsigned, and 128 stands for zero
            weight, out = (self.weight, self.scale, self.zero_points, None), (1.0, 0, x.dtype, "none", [], "")
            product = torch.ops.onednn.qlinear_pointwise(rows, 1.0, 128, *weight, *out)
        else:  # torch stores the sums as integers, which oneDNN scales before it stores them
            product = torch._int_mm(rows, self.weight).mul(self.scale).to(x.dtype)
        product = product.mul_(scale) if self.bias is None else torch.addcmul(self.bias, product, scale)
        return product.view(*x.shape[:-1], len(self.scale))

    __deepcopy__ = OneDnnLinear.__deepcopy__


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, K) as integers, and the scale (N, 1) of each. The bits of bf16 numbers without their signs are integers
    of the same order, of which the largest is found in a third of the time."""
    bits = rows.view(torch.int16) & 0x7FFF if rows.dtype == torch.bfloat16 else rows.abs()
    scale = bits.amax(dim=1, keepdim=True).view(rows.dtype).clamp_min_(1e-12) / 126  # bf16 rounds: 127 might overflow
    return (rows / scale).round_().to(torch.int8), scale


class PatchLinear(nn.Module):
    """The image tower's convolution by one of the linear layers above, for inference."""

    def __init__(self, conv: nn.Conv2d, layer):
        super().__init__()
        self.patch_size = conv.stride[0]
        linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=False, device="meta")
        linear.weight = nn.Parameter(conv.weight.flatten(1), requires_grad=False)
        self.linear = layer(linear)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return patch_product(pixel_values, self.patch_size, self.linear)


def patch_product(pixel_values: Tensor, patch_size: int, linear) -> Tensor:
    """A convolution with stride and size P, by a linear layer from 3 P P to W: (B, 3, S, S) to (B, W, S / P, S / P)."""
    (B, C), P, side = pixel_values.shape[:2], patch_size, pixel_values.shape[2] // patch_size
    patches = pixel_values.view(B, C, side, P, side, P).permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, C * P * P)
    return linear(patches).transpose(1, 2).unflatten(2, (side, side))
