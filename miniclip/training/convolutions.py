"""Convolutions that learn with less work: the same gradients, but for rounding.

BatchNorm    with fixed statistics it is linear, so its gains and shifts, which learn as before, go into the
             convolution before it. Neither pass reads feature maps for its sake, and none is kept for it
ReLU         overwrites what it reads: of three feature maps a layer, the backward pass needs one
depthwise    oneDNN is fast at 3 x 3 kernels moved by one pixel. For others its gradients in bf16 take up to thirty
             times as long, half of a training step of EfficientNet: they are put together from the fast case"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from miniclip.inference.matmul import full_precision
from miniclip.model import Tower

CHUNK = 32  # images
Layers = dict[nn.Module, dict[str, nn.Module]]  # of modules, children that take the places of their own


def convolution_wrappers(tower: Tower, image_size: int) -> tuple[Callable, ...]:
    """`learn_faster`, to be the innermost of the `wrappers` of a tower that has something to gain, else nothing."""
    if not {p for p in tower.parameters() if p.requires_grad} - {*tower.projection.parameters()}:
        return ()  # frozen: there is no backward pass
    slow = any(isinstance(module, nn.Conv2d) and is_slow(module.weight, module.stride) for module in tower.modules())
    layers = folded(tower, image_size) if tower.fixed_norms else {}
    return (partial(learn_faster, layers, tower.fixed_norms),) if layers or slow else ()


def learn_faster(layers: Layers, fixed: tuple, tower: Tower, features: Callable, inputs: Tensor) -> Tensor:
    """`features(inputs)`, with other `layers` while the same BatchNorms are `fixed`. Then images do not depend on each
    other: on a CPU they go through it a few at a time, whose feature maps stay in the cache."""
    on_cpu = inputs.device.type == "cpu"
    layers = layers if fixed == tower.fixed_norms else {}
    with FastDepthwise() if on_cpu else nullcontext(), replaced(layers):
        return torch.cat([features(part) for part in (inputs.split(CHUNK) if on_cpu and layers else [inputs])])


@contextmanager
def replaced(layers: Layers):
    """A context in which modules have other children. All else about them, a rate of dropout for example, is theirs."""
    with ExitStack() as stack:
        for module, children in layers.items():
            stack.callback(module._modules.update, dict(module._modules))
            module._modules.update(children)
        yield


def folded(tower: Tower, side: int) -> Layers:
    """Layers with the parameters of the tower's own: convolutions with the fixed BatchNorms behind them, and ReLUs that
    overwrite; none if they make a difference to an image: the order of modules is a guess at their use."""
    layers = {}
    fixed = {*tower.fixed_norms}
    for module in tower.modules():
        children = list(module._modules.items())
        found = {n: type(child)(inplace=True) for n, child in children if type(child) in (nn.ReLU, nn.ReLU6)}
        for (n, conv), (m, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d and norm in fixed and norm.affine:
                found |= {n: FoldedConv(conv, norm), m: nn.Identity()}
        layers |= {module: found} if found else {}
    image = torch.linspace(-2, 2, 3 * side * side, device=next(tower.parameters()).device).sin().view(1, 3, side, side)
    was_training = tower.training
    with torch.no_grad(), full_precision(), torch.autocast(image.device.type, enabled=False):  # TF32 is off by as much
        expected = tower.eval().features(image)
        with replaced(layers):
            found = tower.features(image)
    tower.train(was_training)
    return layers if torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item()) else {}


class FoldedConv(nn.Conv2d):
    """A convolution and the fixed BatchNorm after it in one; its sizes and parameters are the convolution's."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__(1, 1, 1, device="meta")  # which draws no random numbers; then all is the convolution's
        vars(self).update(vars(conv), layers=(conv, norm))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.layers
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias + ((0 if conv.bias is None else conv.bias) - norm.running_mean) * gain
        return functional_call(conv, {"weight": conv.weight * gain.view(-1, 1, 1, 1), "bias": bias}, x)


class FastDepthwise(TorchFunctionMode):
    """A context in which depthwise convolutions in bf16 get their gradients from `DepthwiseConv`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def is_slow(weight: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether the gradients of a convolution with such kernels are slow in bf16, and `DepthwiseConv` has them."""
    square = weight.ndim == 4 and weight.shape[2] == weight.shape[3] >= 3 and len({*stride}) == 1
    return square and weight.shape[1] == 1 < len(weight) and (weight.shape[2] > 3 or stride[0] > 1)


def conv2d(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """torch's, of images (B, C, H, W), by `DepthwiseConv` where that is faster."""
    stride, padding, dilation = ((n, n) if isinstance(n, int) else n for n in (stride, padding, dilation))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    plain = groups == len(weight) == x.shape[1] and {*dilation} == {1} and not isinstance(padding, str)
    if dtype == torch.bfloat16 and torch.is_grad_enabled() and plain and is_slow(weight, stride):
        x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
        return DepthwiseConv.apply(x, weight, bias, stride[0], padding)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


class DepthwiseConv(torch.autograd.Function):
    """Images (B, C, H, W) and kernels (C, 1, K, K), K of at least 3, to images: each channel by its own kernel."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.sizes = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        x = input_gradient(gradient, *ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
        weight = weight_gradient(gradient, *ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[1] else None
        bias = gradient.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None
        return x, weight, bias, None, None


def convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], of: int):
    """torch's gradient of a depthwise convolution's input x (B, C, H, W) (`of` 0) or weight (C, 1, K, K) (1)."""
    # Not torch.nn.grad, which does not keep the layout of x.
    sizes = (stride, stride), padding, (1, 1), False, (0, 0), len(weight)
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, *sizes, (of == 0, of == 1, False))[of]


def input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """With a stride of s every s-th result of stride 1 is kept: the gradients of the others are 0."""
    if stride > 1:
        sides = (n + 2 * p - weight.shape[2] + 1 for n, p in zip(x.shape[2:], padding))
        kept = gradient
        gradient = x.new_empty(*x.shape[:2], *sides).contiguous(memory_format=torch.channels_last).zero_()
        gradient[:, :, ::stride, ::stride] = kept
    return convolution_backward(gradient, x, weight, 1, padding, of=0)


def weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """The 3 x 3 kernels that cover a larger one have its gradient, each for the image moved by its place."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    K = weight.shape[2]
    H, W = ((n - 1) * stride + 3 for n in gradient.shape[2:])  # of the part of the image that such a kernel sees
    places = [min(place, K - 3) for place in range(0, K, 3)]
    found = torch.empty_like(weight)
    for top, left in product(places, places):
        part = x[:, :, top : top + H, left : left + W].contiguous(memory_format=torch.channels_last)
        place = slice(None), slice(None), slice(top, top + 3), slice(left, left + 3)
        found[place] = convolution_backward(gradient, part, weight[place], stride, (0, 0), of=1)
    return found
