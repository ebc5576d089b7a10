"""AdamW in less memory: its two averages in bf16, and none for the rows of an embedding that have not occurred."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from transformers import Trainer

from miniclip.training.fsdp import uses_fsdp
from miniclip.utils.errors import InputError

AVERAGES = ("exp_avg", "exp_avg_sq")


class AdamWBf16(torch.optim.AdamW):
    """torch's AdamW with both averages stored in bf16: 4 bytes a weight instead of 8. A step is computed in fp32.

    What is stored is rounded up or down at random, with the odds that make it right on average. To the nearest, an
    average that changes by less than 1/512 a step (an `adam_beta2` above 0.998) would stay where it is. The random
    numbers depend on the step alone: the same in a resumed run, and on all processes.

    A matrix of which fewer than half the rows have a gradient in its first step, the embedding of tokens, has averages
    for those rows alone that have ever had one, `rows` in its state. The others' are zero in AdamW too."""

    @torch.no_grad()
    def step(self, closure=None):
        """Updates the weights. The Trainer passes no closure, and none is supported."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict):
        state = self.state[p]
        weights, grad = p, p.grad
        if not state or "rows" in state:
            _make_averages(state, p)
        if "rows" in state:
            rows = state["rows"]
            weights, grad = weights[rows], grad[rows]
            p.mul_(1 - group["lr"] * group["weight_decay"])  # the other rows decay, as in AdamW
        averages = [state[name].float() for name in AVERAGES]
        adamw(
            [weights], [grad], *([average] for average in averages), [], [state["step"].to(p.device, copy=True)],
            fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        state["step"] += 1
        if "rows" in state:
            p[rows] = weights
        random = torch.Generator(p.device).manual_seed(int(state["step"]))
        noise = torch.randint(1 << 16, grad.shape, dtype=torch.int32, device=p.device, generator=random)
        for name, average in zip(AVERAGES, averages):
            bits = average.view(torch.int32).add_(noise).bitwise_and_(-1 << 16)  # bf16 is the upper half of fp32
            state[name].copy_(bits.view(torch.float32))

    def load_state_dict(self, state_dict: dict):
        super().load_state_dict(state_dict)  # which makes all of it fp32, without loss
        for state in self.state.values():
            state["step"] = state["step"].cpu()
            state |= {name: state[name].bfloat16() for name in AVERAGES}
            if "rows" in state:
                state["rows"] = state["rows"].long()


def _make_averages(state: dict, p: Tensor):
    """Makes the averages of a parameter, or of those of its rows that have a gradient for the first time."""
    used = p.grad.any(dim=1) if p.ndim == 2 else torch.ones(1)
    if not state:
        some = 2 * int(used.sum()) < len(used)
        state["step"] = torch.zeros(())
        for name in AVERAGES:
            state[name] = torch.zeros((0, p.shape[1]) if some else p.shape, dtype=torch.bfloat16, device=p.device)
        if not some:
            return
        state["rows"] = torch.zeros(0, dtype=torch.long, device=p.device)
    used[state["rows"]] = False
    if len(new := used.nonzero().squeeze(1)):
        state["rows"] = torch.cat([state["rows"], new])
        for name in AVERAGES:
            state[name] = torch.cat([state[name], state[name].new_zeros(len(new), p.shape[1])])


def optimizer(args, model=None) -> tuple[type, dict]:
    """Returns the optimizer that training arguments name, and what it is made with: the Trainer's, or AdamWBf16 for an
    AdamW with `--optim_args states=bf16`. Raises InputError for other states, and for FSDP."""
    states = dict(pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair).get("states")
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if states is None or kind is not torch.optim.AdamW:
        return kind, keywords
    if states != "bf16":
        raise InputError(f"optim_args: states is {states}. It must be bf16; without it they are fp32")
    if uses_fsdp(args):
        raise InputError("optim_args states=bf16 is not supported with fsdp, which shares the states out. Remove it")
    return AdamWBf16, {name: value for name, value in keywords.items() if name != "fused"}
