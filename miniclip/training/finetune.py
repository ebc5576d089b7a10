"""What keeps fine-tuning from forgetting?

Weights that know a lot are to learn something new from little. Each remedy here leaves them less room to move, or looks
back while they do:

    unlock_last     only the last blocks of a tower learn
    layer_rates     the lower a layer lies, the slower it learns, and each tower at its own rate
    PatchDropout    a part of each picture is hidden (FLIP, arXiv 2212.00794), but not in a last stretch of the training
    EMA             the result is a moving average of the weights, not where the last step happened to leave them
    EarlyStopping   training ends when recall no longer rises

A locked tower is in locked.py; what can be done after training in wise_ft.py. Which to use when: docs/finetuning.md.
"""

import re
import types
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from transformers import EarlyStoppingCallback, TrainerCallback

from miniclip.model import MiniClip, VisionTransformer
from miniclip.training.fsdp import uses_fsdp
from miniclip.utils.errors import InputError


def fine_tuning(model: MiniClip, options, args) -> tuple[list[TrainerCallback], dict]:
    """Prepares a model as train.py's options ask, and gives what ClipTrainer takes for it: callbacks, and arguments
    by name. `options` is a TrainOptions, `args` the ClipTrainingArguments. Call it before the trainer is made."""
    callbacks, more, said = [], {}, []
    blocks = options.learning_blocks
    unlock_last(model, *blocks)
    if options.patch_dropout and not isinstance(model.visual, VisionTransformer):
        raise InputError("patch_dropout is for MiniCLIP's own vision transformer. Remove it")
    for kind, tower, learn in zip(("image", "text"), (model.visual, model.text), blocks):
        if learn is not None:
            said.append(f"the last {learn} of {len(tower.blocks)} blocks of the {kind} tower learn")
    scales = options.tower_lr_scales or (1, 1)
    if (*scales, options.layer_decay) != (1, 1, 1):
        rate = layer_rates(model, *scales, options.layer_decay)
        more["lr_scale"] = rate
        learning = [name for name, p in model.named_parameters() if p.requires_grad]
        low, high = min(learning, key=rate), max(learning, key=rate)
        low, high = (f"{args.learning_rate * rate(name):.3g} ({name})" for name in (low, high))
        said.append(f"learning rates from {low} to {high}")
    if options.patch_dropout:
        share, off = (*options.patch_dropout, 0.0)[:2]
        callbacks.append(PatchDropout(model.visual, share, off))
        said.append(f"{share:.0%} of the patches hidden, none in the last {off:.0%} of the steps")
    if options.early_stopping_patience is not None:
        if not args.load_best_model_at_end:
            raise InputError("early stopping ends with the best model: leave out --load_best_model_at_end false")
        callbacks.append(EarlyStopping(options.early_stopping_patience))
        said.append(f"stops after {options.early_stopping_patience} evaluations without a better one")
    if options.ema is not None:
        if uses_fsdp(args):
            raise InputError("ema averages whole weights, of which FSDP gives each process a part: leave out one")
        ema = EMA(model, options.ema, args.device)
        callbacks.append(ema)
        more["ema"] = ema.average.module
        said.append(f"the average of the weights (decay {options.ema:g}) is measured and kept")
    if said and args.process_index == 0:
        print("fine-tuning: " + "; ".join(said))
    return callbacks, more


def unlock_last(model: MiniClip, image: int | None = None, text: int | None = None):
    """Lets only the last blocks of a tower learn, that many, and what comes after them: the last norm and the
    projection. All before is frozen: patches or tokens, positions, earlier blocks, and their norms with whatever
    statistics those keep. None leaves a tower as it is; 0 lets the projection alone learn, as `lock(..., "tower")`.

    Nothing goes back through the frozen part: that saves most of its backward pass and of its memory. OpenCLIP's
    `--lock-image-unlocked-groups` counts the projection as a group, and so is one more than ours. Raises InputError
    for more blocks than there are.
    """
    for kind, tower, head, blocks in (
        ("image", model.visual, "proj", image),
        ("text", model.text, "text_projection", text),
    ):
        if blocks is None:
            continue
        layers = len(tower.blocks)
        if not 0 <= blocks <= layers:
            raise InputError(f"{blocks} blocks of the {kind} tower are to learn, and it has {layers}")
        depth = depths(tower)
        for name, p in tower.named_parameters():
            p.requires_grad_(depth[name] <= blocks if blocks else name.partition(".")[0] == head)
        hold_statistics(tower, learning=True)


TOP = re.compile(r"norm|^_?bn|ln_|final|proj|pool|head")  # names of what comes after the blocks


def depths(tower: nn.Module) -> dict[str, int]:
    """How far from the top of a tower of n blocks each of its parameters lies: those of the last block 1, of the first
    n, what comes before n + 1 (embeddings, positions), and what comes after 0 (norm, projection). What lies between
    two blocks counts with the upper one. Parameters are registered in the order in which they are used; the exceptions
    are those of embeddings and of biases of attention, which some encoders register last."""
    number = {p: i for i, block in enumerate(tower.blocks) for p in block.parameters()}
    n, found = len(tower.blocks), {}
    seen = -1  # the last block met
    for name, p in tower.named_parameters():
        seen = number.get(p, seen)
        after = seen >= 0 and "embed" not in name and (seen < n - 1 or any(map(TOP.search, name.split("."))))
        found[name] = n - number[p] if p in number else n - 1 - seen if after else n + 1
    return found


def hold_statistics(module: nn.Module, learning: bool = False):
    """Keeps each BatchNorm whose own weights are all frozen in evaluation mode, whatever `train` is called on: in
    training mode it would move its mean and variance though nothing in it learns. `learning`: those whose weights learn
    too, for the statistics of their first training are better than any of a few small batches."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and (learning or not any(p.requires_grad for p in norm.parameters())):
            norm.eval()
            norm.train = types.MethodType(_stay_in_evaluation, norm)


def _stay_in_evaluation(norm: nn.Module, mode: bool = True) -> nn.Module:
    return norm


def layer_rates(
    model: MiniClip, image: float = 1.0, text: float = 1.0, layer_decay: float = 1.0
) -> Callable[[str], float]:
    """Gives a function from a parameter's name to the factor of its learning rate:

        (image or text) x layer_decay ** depth

    where depth counts down from the top of a tower of n blocks: its last norm and its projection have depth 0, the
    last block 1, the first block n, and embeddings, positions and `ln_pre` n + 1 (BEiT's layer-wise decay, arXiv
    2106.08254, for both towers). The factor of `logit_scale` is 1. AdamW's weight decay shrinks along with the rate.
    """
    towers = {"visual": (depths(model.visual), image), "text": (depths(model.text), text)}

    def rate(name: str) -> float:
        tower, *path = (part for part in name.split(".") if part != "_fsdp_wrapped_module")
        if tower not in towers:
            return 1.0
        depth, factor = towers[tower]
        return factor * layer_decay ** depth[".".join(path)]

    return rate


class PatchDropout(TrainerCallback):
    """Hides a `share` of the patches from the image tower in training, and none in the last part of the steps, `off`,
    so that it ends used to whole pictures. A function of the step alone, so that a resumed run does the same. The
    model's config, and with it what is saved, keeps the share that it had."""

    def __init__(self, tower: VisionTransformer, share: float, off: float = 0.0):
        self.tower, self.share, self.off, self.own = tower, share, off, tower.patch_dropout

    def on_step_begin(self, args, state, control, **kwargs):
        whole_from = round((1 - self.off) * state.max_steps)
        self.tower.patch_dropout = self.share if state.global_step < whole_from else 0.0

    def on_train_end(self, args, state, control, **kwargs):
        self.tower.patch_dropout = self.own


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, on the metric that chooses the best model. How long nothing got better is in the
    checkpoints: a resumed run goes on counting, by the patience that it was given itself."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if saved := state.stateful_callbacks.get(type(self).__name__):
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
            if self.early_stopping_patience_counter >= self.early_stopping_patience:
                control.should_training_stop = True  # it had ended


class EMA(TrainerCallback):
    """An exponential moving average of the weights, `average.module`, in which each step of training counts less the
    longer it is ago:

        average_0 = weights at the start
        average_t = d average_(t-1) + (1 - d) weights_t        d = min(decay, (1 + t) / (10 + t))

    after step t, BatchNorm's statistics included. d begins low so that a short run is not averaged with its start for
    most of its length.

    Give ClipTrainer `average.module` as `ema`: then the average is what all evaluations during training measure, and
    so what early stopping and the choice of the best checkpoint go by. A checkpoint has the weights that learn in
    model.safetensors, from which a resumed run goes on, and the average in ema.safetensors (a weight file for
    `--pretrained`). At the end the average, that of the best checkpoint with load_best_model_at_end, takes the place
    of the model's weights: it is what is saved in output_dir and measured last.
    """

    def __init__(self, model: MiniClip, decay: float, device: str | torch.device | None = None):
        move = partial(_move_average, decay)
        self.model, self.average = model, AveragedModel(model, device, multi_avg_fn=move, use_buffers=True)
        self.average.n_averaged = self.average.n_averaged.cpu()  # it is read at every step: no GPU is to be waited for

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.average.n_averaged.zero_()
            self.average.update_parameters(self.model)  # the first time it copies
        else:  # the trainer has read the average
            self.average.n_averaged.fill_(1 + state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update_parameters(self.model)

    def on_train_end(self, args, state, control, **kwargs):
        self.model.load_state_dict(self.average.module.state_dict())


@torch.no_grad()
def _move_average(decay: float, average: list[Tensor], weights: list[Tensor], t: Tensor):
    t = int(t)
    if average[0].is_floating_point():
        torch._foreach_lerp_(average, weights, 1 - min(decay, (1 + t) / (10 + t)))  # bit-equal where nothing changed
    else:  # counters
        torch._foreach_copy_(average, weights)
