"""The limit: how fast this machine multiplies large matrices, and how much there is to multiply in a model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from miniclip.inference.matmul import OneDnnLinear, packs

SQUARE, LONG = 2048, 0.4  # rows of the matrices, on a GPU four times as many; seconds for each way


@torch.inference_mode()
def products(device: str | torch.device = "cpu", square: int = SQUARE) -> dict[str, Callable[[], float]]:
    """Functions that multiply square matrices, by precision, each in the fastest way there is: "fp32" without rounding,
    "bf16" where the machine multiplies it, "int8" on a CPU. They return one of the numbers, and so wait for a GPU."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(square, square, generator=draw).to(device) for _ in range(2))
    ways: dict[str, list[Callable[[], Tensor]]] = {"fp32": [lambda: a @ b]}
    cpu = torch.device(device).type == "cpu"
    if cpu and torch.backends.mkldnn.is_available():
        linear = nn.Linear(square, square)
        linear.weight.data = b
        packed = OneDnnLinear(linear)
        ways["fp32"].append(lambda: packed(a))
    if not cpu or packs("bf16"):
        low = a.bfloat16(), b.bfloat16()
        ways["bf16"] = [lambda: low[0] @ low[1]]
    if cpu:
        whole = [(10 * x).clamp(-127, 127).to(torch.int8) for x in (a, b)]
        ways["int8"] = [lambda: torch._int_mm(*whole)]
    waiting = {name: [lambda way=way: way()[0, 0].item() for way in some] for name, some in ways.items()}
    return {name: min(some, key=least_seconds) for name, some in waiting.items()}


@torch.inference_mode()
def least_seconds(multiply: Callable[[], float]) -> float:
    """Seconds of the fastest of the products that fit into LONG."""
    timer = Timer("multiply()", globals={"multiply": multiply}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=LONG).times)


def model_flops(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    """Operations of a model's matrix products, convolutions and attention: `encode` is a method of the plain model.
    The fast path needs up to a tenth less, as of the last block only one position is read."""
    # Attention is written out: fused it is not counted on the CPU. With gradients: the counter fails without them where
    # a parameter is a layer's input, as in SigLIP's pool.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            encode(inputs)
    return counter.get_total_flops()
