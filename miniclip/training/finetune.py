"""Fine-tuning with less forgetting: rates by layer and tower, patch dropout, early stopping and a weight average.

Freezing is in freeze.py, mixing with the old weights afterwards in wise_ft.py. When to use what: docs/finetuning.md."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import EarlyStoppingCallback, TrainerCallback

from miniclip.model import MiniClip, Tower
from miniclip.training.freeze import depths
from miniclip.training.fsdp import uses_fsdp
from miniclip.utils.errors import InputError


def fine_tuning(model: MiniClip, options, args) -> tuple[list[TrainerCallback], dict]:
    """Returns the callbacks and keyword arguments for RunTrainer that `options`, a TrainOptions, ask for."""
    callbacks, extras = [], {}
    summary = []  # what is printed of them
    for kind, tower, how in (("image", model.visual, options.freeze_image), ("text", model.text, options.freeze_text)):
        if how.startswith("all_but_"):
            summary.append(f"the last {how[8:]} of {len(tower.blocks)} blocks of the {kind} tower are trained")
    scales = options.tower_lr_scales or (1, 1)
    if (*scales, options.layer_decay) != (1, 1, 1):
        extras["lr_scale"] = rate = layer_rates(model, *scales, options.layer_decay)
        learning = [name for name, p in model.named_parameters() if p.requires_grad]
        ends = min(learning, key=rate), max(learning, key=rate)
        summary.append("learning rates from " + " to ".join(f"{args.learning_rate * rate(n):.3g} ({n})" for n in ends))
    if options.patch_dropout:
        if "patch_dropout" not in vars(model.config.vision_cfg):
            raise InputError("patch_dropout has no effect: this image tower has no patches to leave out. Remove it")
        share, off = (*options.patch_dropout, 0.0)[:2]
        callbacks.append(PatchDropout(model.visual, share, off))
        summary.append(f"{share:.0%} of the patches dropped, none in the last {off:.0%} of the steps")
    if options.early_stopping_patience is not None:
        if not args.load_best_model_at_end:
            raise InputError("early stopping ends with the best model. Remove --load_best_model_at_end false")
        callbacks.append(EarlyStopping(options.early_stopping_patience))
        summary.append(f"stops after {options.early_stopping_patience} evaluations without improvement")
    if options.ema is not None:
        if uses_fsdp(args):
            raise InputError("ema averages whole weights, but FSDP shards them. Remove one of them")
        callbacks.append(EMA(model, options.ema, args.device))
        extras["ema"] = callbacks[-1].average.module
        summary.append(f"the average of the weights (decay {options.ema:g}) is evaluated and saved")
    if summary and args.process_index == 0:
        print("fine-tuning: " + "; ".join(summary))
    return callbacks, extras


def layer_rates(model: MiniClip, image: float = 1, text: float = 1, layer_decay: float = 1) -> Callable[[str], float]:
    """Returns a function from a parameter's name to the factor of its learning rate: (image or text) x layer_decay **
    depth, with depth as in `depths` (BEiT's layer-wise decay, arXiv 2106.08254, for both towers), and 1 for
    `logit_scale`. AdamW's weight decay shrinks with the rate."""
    rates = {
        f"{prefix}.{name}": factor * layer_decay**depth
        for prefix, tower, factor in (("visual", model.visual, image), ("text", model.text, text))
        for name, depth in depths(tower).items()
    }
    return lambda name: rates.get(name.replace("_fsdp_wrapped_module.", ""), 1.0)


class PatchDropout(TrainerCallback):
    """Drops a `share` of the image patches in training (FLIP: arXiv 2212.00794), but none in the last fraction `off` of
    the steps, so that the model ends accustomed to whole images. The model's config keeps its own share."""

    def __init__(self, tower: Tower, share: float, off: float = 0.0):
        self.tower, self.share, self.off, self.own = tower, share, off, tower.patch_dropout
        tower.patch_dropout = share  # refused here, before training, where a model of timm leaves out no patches

    def on_step_begin(self, args, state, control, **kwargs):
        self.tower.patch_dropout = self.share * (state.global_step < round((1 - self.off) * state.max_steps))

    def on_train_end(self, args, state, control, **kwargs):
        self.tower.patch_dropout = self.own


def drop_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """All that drops something at random in training: (module, attribute, rate above 0)."""
    for module in model.modules():
        for name, value in vars(module).items():
            drops = "drop" in name or name in ("p", "prob") and "Dropout" in type(module).__name__  # also timm's
            if drops and isinstance(value, float) and value > 0:
                yield module, name, value


@contextmanager
def no_dropout(model: nn.Module):
    """A context without dropout and patch dropout."""
    with ExitStack() as stack:
        for module, name, rate in list(drop_rates(model)):
            setattr(module, name, 0.0)
            stack.callback(setattr, module, name, rate)
        yield


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping. A resumed run continues the count in its checkpoint, with its own patience."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if saved := state.stateful_callbacks.get(type(self).__name__):
            count = self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
            control.should_training_stop |= count >= self.early_stopping_patience  # it had stopped already


class EMA(TrainerCallback):
    """An exponential moving average of the weights, `average.module`, BatchNorm's statistics included: after step t

        average_t = d average_(t-1) + (1 - d) weights_t        d = min(decay, (1 + t) / (10 + t))

    from the weights at the start. The low d of the first steps keeps these from dominating the average of a short run.
    With `average.module` as its `ema`, RunTrainer evaluates the average and saves it in checkpoints as ema.safetensors.
    At the end the average, of the best checkpoint with load_best_model_at_end, replaces the model's weights."""

    def __init__(self, model: MiniClip, decay: float, device: str | torch.device | None = None):
        self.model, self.decay = model, decay
        self.average = AveragedModel(model, device, multi_avg_fn=self.move, use_buffers=True)
        self.average.n_averaged = self.average.n_averaged.cpu()  # read at every step, which must not wait for a GPU

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.average.n_averaged.zero_()
            self.average.update_parameters(self.model)  # the first time it copies
        else:  # the trainer has loaded the average
            self.average.n_averaged.fill_(1 + state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update_parameters(self.model)

    def on_train_end(self, args, state, control, **kwargs):
        self.model.load_state_dict(self.average.module.state_dict())

    @torch.no_grad()
    def move(self, average: list[Tensor], weights: list[Tensor], _):
        if average[0].is_floating_point():  # bit-equal where nothing changed
            t = int(self.average.n_averaged)  # torch passes it on the device of the weights
            torch._foreach_lerp_(average, weights, 1 - min(self.decay, (1 + t) / (10 + t)))
        else:  # counters
            torch._foreach_copy_(average, weights)
