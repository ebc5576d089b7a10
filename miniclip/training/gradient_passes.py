"""The gradients of a run's first step: as it would be trained, and in ways that tell what makes a difference.

    run        the trainer's own step: processes, GradCache, accumulation, precision, freezing, dropout
    exact      the same in fp32 and without dropout
    expected   the plain model on one process, with one loss for each accumulation step
    one batch  the plain model on one process, with one loss for all pairs of the step

A `Probe` computes the first two, a `Reference` the others; `check_gradients.py` compares them."""

import re
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from miniclip.inference.matmul import full_precision, rounds
from miniclip.model import ClipOutput, MiniClip, Tower
from miniclip.training.finetune import drop_rates, no_dropout
from miniclip.training.grad_cache import wrap_towers
from miniclip.utils.image_files import open_image

TOLERANCE = 1e-3  # of fp32: many times its rounding, and far below what a lost gradient makes
SMALL = 8  # pairs of a batch that tells which part is wrong


@dataclass
class Pass:
    """A step: its gradient by parameter, its mean loss, and the gradients of its embeddings, by accumulation step."""

    grads: dict[str, Tensor]
    loss: float
    embed_grads: list[list[Tensor | None]]
    agree: bool = True  # whether all processes have the same gradient


class Measured(Exception):  # noqa: N818
    """Ends training before the optimizer changes the weights."""


class Probe(TrainerCallback):
    """Repeats a trainer's first step in the ways described above, on all processes together, and ends the training."""

    def __init__(self, trainer):
        args = trainer.args
        self.trainer, self.loss = trainer, trainer.loss
        self.passes: dict[str, Pass] = {}
        self.batches: list[dict[str, Tensor]] = []  # of the step
        self.losses, self.embed_grads = [], []  # of the pass under way, by batch
        self.precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "tf32" if tf32(args.device) else None
        self.scaler = trainer.accelerator.scaler  # of the loss, in fp16
        self.batch_norm = any(isinstance(m, _BatchNorm) and m.training for m in trainer.model.modules())

    def recorded_loss(self, outputs: ClipOutput, batch: dict[str, Tensor]) -> Tensor:
        """The trainer's loss, which sees each batch and what it makes of it."""
        loss = self.loss(outputs, batch)
        grads = [None, None]
        for number, embeds in enumerate(outputs[:2]):
            if embeds.requires_grad:
                embeds.register_hook(lambda grad, number=number: grads.__setitem__(number, grad.float().cpu()))
        self.recording.append(batch)
        self.losses.append(loss.detach().float())
        self.embed_grads.append(grads)
        return loss

    def on_step_begin(self, args, state, control, **kwargs):
        self.seed = torch.initial_seed()  # ContrastiveCallback has just set it
        self.recording = self.batches

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = self.trainer.model
        run = self.collect()
        self.recording = []  # of the repetitions, which nothing reads
        before = scale = self.scaler.get_scale() if self.scaler else 1.0
        # Trainer skips a step that overflows and halves the scale.
        while self.scaler and scale > 1 and not all(grad.isfinite().all() for grad in run.grads.values()):
            self.scaler.update(scale := scale / 2)
            run = self.repeat(self.batches)
        self.passes["run"] = run
        self.scales = before, scale
        self.dropout = bool(list(drop_rates(model)))
        if self.dropout:
            with exactly(model, args):
                self.repeat(self.batches)
                towers = (tower for tower in (model.visual, model.text) if list(drop_rates(tower)))
                self.slopes = [self.slope(tower) for tower in towers]
            if self.precision:
                with no_dropout(model):
                    self.passes["without dropout"] = self.repeat(self.batches)
        self.passes["exact"] = self.passes["run"]
        if self.dropout or self.precision or args.torch_compile:
            with exactly(model, args), no_dropout(model):
                self.passes["exact"] = self.repeat(self.batches)
        wrappers = model.visual.wrappers, model.text.wrappers
        with exactly(model, args), no_dropout(model):
            for name, fast in (("small", args.fast and not self.trainer.sharded), ("small plain", False)):
                wrap_towers(model, self.trainer.normalize, 0, fast)
                self.passes[name] = self.repeat(self.batches, SMALL)
        model.visual.wrappers, model.text.wrappers = wrappers
        model.zero_grad()
        if self.scaler:
            self.scaler.update(before)
        raise Measured

    def repeat(self, batches: list[dict[str, Tensor]], rows: int | None = None) -> Pass:
        """The step again, on the first rows of these batches, as `Trainer` takes it, with the same random numbers."""
        self.trainer.model.zero_grad()
        self.losses, self.embed_grads = [], []
        torch.manual_seed(self.seed)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            self.trainer.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.trainer.accelerator.no_sync(self.trainer.model_wrapped):
                inputs = {name: value[:rows] for name, value in batch.items()}
                self.trainer.training_step(self.trainer.model_wrapped, inputs)
        self.trainer.guard.batches.clear()
        if self.scaler:
            self.scaler.update(self.scaler.get_scale())  # forgets that the gradient was unscaled before
            self.trainer.accelerator.unscale_gradients()
        return self.collect()

    def collect(self) -> Pass:
        """What the last step left in the model, as all processes see it."""
        scale = self.scaler.get_scale() if self.scaler else 1
        grads = {
            re.sub(r"_\w+_wrapped_module\.", "", name): whole(p.grad).float().cpu().clone()
            for name, p in self.trainer.model.named_parameters() if p.grad is not None
        }  # fmt: skip
        mine = torch.stack([g.norm() for g in grads.values()]), torch.stack(self.losses).mean().item(), self.embed_grads
        norms, losses, embed_grads = zip(*gather_object([mine]))
        # [accumulation step][image or text], the rows of all processes
        rows = [[None if g[0] is None else torch.cat(g) / scale for g in zip(*step)] for step in zip(*embed_grads)]
        agree = all(torch.allclose(n, norms[0], rtol=TOLERANCE) for n in norms)
        return Pass(grads, sum(losses) / len(losses), rows, agree)

    @torch.no_grad()
    def slope(self, tower: Tower) -> float:
        """The slope of the loss along the gradient of a tower, by moving its weights, over what the gradient says: 1,
        or the backward pass has not repeated the random numbers of the forward pass."""
        moved = [(p, p.clone(), p.grad.clone()) for p in tower.parameters() if p.grad is not None]
        square = sum(float(whole(grad).square().sum()) for _, _, grad in moved)
        far = 1e-3 / max(square, 1e-12)  # enough to change the loss by 0.001
        losses = []
        for distance in (far, -far):
            for p, before, grad in moved:
                p.copy_(before.add(grad, alpha=distance))
            torch.manual_seed(self.seed)
            values = [self.trainer.compute_loss(self.trainer.model_wrapped, dict(batch)) for batch in self.batches]
            losses.append(sum(gather_object([float(sum(values)) / len(values)])) / self.trainer.args.world_size)
        for p, before, _ in moved:
            p.copy_(before)
        return (losses[0] - losses[1]) / 2e-3 if square > 1e-12 else 1.0

    def inputs(self) -> list[list[dict[str, Tensor]]]:
        """The batches of all processes, [accumulation step][process], with images and token ids for features."""
        dataset, tokenize = self.trainer.train_dataset, self.trainer.data_collator.tokenize
        found = [{name: value.cpu() for name, value in batch.items()} for batch in self.batches]
        for batch in found:
            if "image_features" in batch:
                images = (dataset.records[int(row[0]) % len(dataset)]["image"] for row in batch["row"])
                pixels = [dataset.preprocess.levels(open_image(image, dataset.preprocess.scale)) for image in images]
                batch["pixel_values"] = torch.stack(pixels)
            if "text_features" in batch:
                batch["input_ids"] = tokenize([dataset.label(row)["caption"] for row in batch["row"]], trim=True)
        return [list(step) for step in zip(*gather_object([found]))]


class Reference:
    """The plain model on one process: gradients of losses over whole batches. The towers see `piece` pairs at a time,
    and their gradients are added up by the chain rule, so that it needs no more memory than the run."""

    def __init__(self, model: MiniClip, loss: Callable, normalize: Callable, device: torch.device, piece: int):
        self.model = wrap_towers(model.to(device).train(), normalize, 0, fast=False)
        self.loss, self.device, self.piece = loss, device, piece

    def __call__(self, losses: list[dict], precision: str | None = None, scale=1.0, piece: int | None = None) -> Pass:
        """The mean gradient of the losses of these batches, of any number of pairs; in fp16 with a loss scale."""
        self.scale = scale
        self.model.zero_grad()
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        autocast = torch.autocast(self.device.type, kind) if kind else nullcontext()
        with autocast, nullcontext() if precision == "tf32" else full_precision(), no_dropout(self.model):
            found = [self.add(batch, len(losses), piece or self.piece) for batch in losses]
        grads = {name: p.grad.cpu() / self.scale for name, p in self.model.named_parameters() if p.grad is not None}
        return Pass(grads, sum(loss for loss, _ in found) / len(found), [grads for _, grads in found])

    def add(self, batch: dict[str, Tensor], steps: int, piece: int) -> tuple[float, list[Tensor | None]]:
        """Adds the gradient of one loss, divided by their number. Returns the loss and its embeddings' gradients."""
        batch = {name: value.to(self.device) for name, value in batch.items()}
        sides = (self.model.encode_image, batch["pixel_values"]), (self.model.encode_text, batch["input_ids"])
        with torch.no_grad():
            embeds = [torch.cat([f(part, normalize=True).float() for part in x.split(piece)]) for f, x in sides]
        leaves = [e.requires_grad_() for e in embeds]
        bias = None if self.model.logit_bias is None else self.model.logit_bias.sum()
        loss = self.loss(ClipOutput(*leaves, self.model.logit_scale.exp().sum(), bias), batch)
        (loss * self.scale / steps).backward()
        for (encode, inputs), leaf in zip(sides, leaves):
            for part, grad in zip(inputs.split(piece), leaf.grad.split(piece)):
                if (embedded := encode(part, normalize=True)).requires_grad:
                    embedded.backward(grad.to(embedded.dtype))
        return loss.item(), [leaf.grad.cpu() / self.scale for leaf in leaves]


def concatenate(batches: list[dict[str, Tensor]], pad: int, rows: int | None = None) -> dict[str, Tensor]:
    """One batch of the first rows of several, whose token ids are padded to the same length."""
    texts = [row for batch in batches for row in batch["input_ids"][:rows]]
    ids = pad_sequence(texts, batch_first=True, padding_value=pad)
    names = batches[0].keys() - {"input_ids"}
    return {name: torch.cat([batch[name][:rows] for batch in batches]) for name in names} | {"input_ids": ids}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def exactly(model: MiniClip, args):
    """A context in which a trainer's towers compute in fp32 and uncompiled."""
    calls = ExitStack()

    def enter(*_):
        calls.enter_context(torch.autocast(args.device.type, enabled=False))

    with ExitStack() as stack:
        for tower in (model.visual, model.text):
            stack.enter_context(tower.register_forward_pre_hook(enter))
            stack.enter_context(tower.register_forward_hook(lambda *_: calls.close(), always_call=True))
        stack.enter_context(full_precision())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(setattr, args, "bf16", args.bf16)
        args.bf16 = False  # read by the wrapper of FSDP
        yield


def tf32(device: torch.device) -> bool:
    """Whether fp32 products, or only those of convolutions, which is torch's default, are rounded to TF32."""
    return device.type == "cuda" and (rounds("cuda") or torch.backends.cudnn.conv.fp32_precision == "tf32")
