"""A check of a run's gradients: its first step as it would be trained, against one big fp32 batch of the plain model.

    run        the trainer's own step: processes, GradCache, accumulation, precision, freezing, dropout
    exact      the same in fp32 and without dropout
    expected   the plain model on one process, with one loss for each accumulation step
    one batch  the plain model on one process, with one loss for all pairs of the step

Dropout and low precision make the first two differ, accumulation the last two. Those in the middle have to be equal, up
to the rounding of fp32: a difference there is a mistake, whose cause `explain` looks for.
"""

import copy
import re
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from miniclip.inference.matmul import full_precision
from miniclip.model import ClipOutput, MiniClip, Tower
from miniclip.training.finetune import drop_rates, no_dropout
from miniclip.training.grad_cache import wrap_towers
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import open_image

TOLERANCE = 1e-3  # of fp32: many times its rounding, and far below what a lost gradient makes
NEGLIGIBLE = 1e-5, 1e-6  # of the whole gradient, and of a loss of about 1: smaller differences are not judged
PROJECTION = re.compile(r"visual\.proj\b|text\.(text_projection|proj)\b")
SMALL = 8  # pairs of a batch that tells which part is wrong


@dataclass
class Pass:
    """A step: its gradient by parameter, its mean loss, and the gradients of its embeddings, by accumulation step."""

    grads: dict[str, Tensor]
    loss: float
    embed_grads: list[list[Tensor | None]]
    agree: bool = True  # whether all processes have the same gradient


class _Measured(Exception):  # noqa: N818
    """Ends training before the optimizer changes the weights."""


class Probe(TrainerCallback):
    """Repeats a trainer's first step in the ways described above, on all processes together, and ends the training."""

    def __init__(self, trainer):
        args, self.trainer, self.loss = trainer.args, trainer, trainer.loss
        self.batches, self.passes, self.losses, self.embed_grads, self.dropout = [], {}, [], [], False
        tf32 = args.device.type == "cuda" and torch.backends.cudnn.allow_tf32  # torch's default for convolutions
        self.precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "tf32" if tf32 else None
        self.batch_norm = any(isinstance(m, _BatchNorm) and m.training for m in trainer.model.modules())

    def recorded_loss(self, outputs: ClipOutput, batch: dict[str, Tensor]) -> Tensor:
        """The trainer's loss, which sees each batch and what it makes of it."""
        loss, grads = self.loss(outputs, batch), [None, None]
        for number, embeds in enumerate(outputs[:2]):
            if embeds.requires_grad:
                embeds.register_hook(lambda grad, number=number: grads.__setitem__(number, grad.float().cpu()))
        self.recording.append(batch)
        self.losses.append(loss.detach().float())
        self.embed_grads.append(grads)
        return loss

    def on_step_begin(self, args, state, control, **kwargs):
        self.seed, self.recording = torch.initial_seed(), self.batches  # ContrastiveCallback has just set it

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.passes["run"] = self.collect()
        self.recording, model = [], self.trainer.model
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
        raise _Measured

    def repeat(self, batches: list[dict[str, Tensor]], rows: int | None = None) -> Pass:
        """The step again, on the first rows of these batches, as `Trainer` takes it, with the same random numbers."""
        self.trainer.model.zero_grad()
        self.losses, self.embed_grads, accelerator = [], [], self.trainer.accelerator
        torch.manual_seed(self.seed)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else accelerator.no_sync(self.trainer.model_wrapped):
                inputs = {name: value[:rows] for name, value in batch.items()}
                self.trainer.training_step(self.trainer.model_wrapped, inputs)
        self.trainer.guard.batches.clear()
        return self.collect()

    def collect(self) -> Pass:
        """What the last step left in the model, as all processes see it."""
        scale = scaler.get_scale() if (scaler := self.trainer.accelerator.scaler) else 1  # of fp16
        grads = {
            re.sub(r"_\w+_wrapped_module\.", "", name): whole(p.grad).float().cpu() / scale
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
        square, losses = sum(float(whole(grad).square().sum()) for _, _, grad in moved), []
        far = 1e-3 / max(square, 1e-12)  # enough to change the loss by 0.001
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

    def __call__(self, losses: list[dict[str, Tensor]], precision: str | None = None, piece: int | None = None) -> Pass:
        """The mean gradient of the losses of these batches, of any number of pairs."""
        self.model.zero_grad()
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        autocast = torch.autocast(self.device.type, kind) if kind else nullcontext()
        with autocast, nullcontext() if precision == "tf32" else full_precision(), no_dropout(self.model):
            found = [self.add(batch, len(losses), piece or self.piece) for batch in losses]
        grads = {n: p.grad.cpu().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return Pass(grads, sum(loss for loss, _ in found) / len(found), [grads for _, grads in found])

    def add(self, batch: dict[str, Tensor], steps: int, piece: int) -> tuple[float, list[Tensor | None]]:
        """Adds the gradient of one loss, divided by their number. Returns the loss and its embeddings' gradients."""
        batch, model = {name: value.to(self.device) for name, value in batch.items()}, self.model
        sides = (model.encode_image, batch["pixel_values"]), (model.encode_text, batch["input_ids"])
        with torch.no_grad():
            embeds = [torch.cat([f(part, normalize=True).float() for part in x.split(piece)]) for f, x in sides]
        leaves = [e.requires_grad_() for e in embeds]
        bias = None if model.logit_bias is None else model.logit_bias.sum()
        loss = self.loss(ClipOutput(*leaves, model.logit_scale.exp().sum(), bias), batch)
        (loss / steps).backward()
        for (encode, inputs), leaf in zip(sides, leaves):
            for part, grad in zip(inputs.split(piece), leaf.grad.split(piece)):
                if (embedded := encode(part, normalize=True)).requires_grad:
                    embedded.backward(grad.to(embedded.dtype))
        return loss.item(), [leaf.grad.cpu() for leaf in leaves]


def check_gradients(trainer):
    """Compares the gradients of a trainer's first step with those of one big fp32 batch, prints a table, and raises
    InputError if they differ by more than accumulation, rounding and dropout make. Weights and random numbers stay as
    they are; a process group is ended. No optimizer step is made, and nothing is written."""
    args, model, first = trainer.args, trainer.model, trainer.is_world_process_zero()
    if trainer.is_deepspeed_enabled:
        raise InputError("check_gradients does not work with DeepSpeed. Remove one of them")
    plain = copy.deepcopy(model) if first else None
    probe, clip = Probe(trainer), args.max_grad_norm
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    trainer.loss, args.max_grad_norm = probe.recorded_loss, 0  # clipping would hide a wrong factor
    trainer.add_callback(probe)
    with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
        try:
            trainer.train()
        except _Measured:
            inputs = probe.inputs()
        except FloatingPointError:
            raise InputError("the first step's loss or gradient is NaN or infinite; training lists its batch") from None
        finally:
            trainer.remove_callback(probe)
            trainer.loss, args.max_grad_norm = probe.loss, clip
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
        if dist.is_initialized():
            dist.destroy_process_group()  # from here on the loss is that of one process
        if first:
            piece = args.grad_cache_chunk_size or args.per_device_train_batch_size
            reference = Reference(plain, probe.loss, trainer.normalize, args.device, piece)
            report(probe, reference, inputs, args)


def report(probe: Probe, reference: Reference, inputs: list[list[dict[str, Tensor]]], args):
    """Prints the table and the causes. Raises InputError for a difference without a known cause."""
    passes, pad = probe.passes, probe.trainer.data_collator.tokenize.pad_token_id
    steps = [concatenate(step, pad) for step in inputs]
    everything = concatenate(steps, pad)
    pairs = len(everything["pixel_values"])
    expected = reference(steps)
    piece = pairs if probe.batch_norm else reference.piece
    one = expected if len(steps) == 1 and piece == reference.piece else reference([everything], piece=piece)
    exact, run, columns, causes, faults = passes["exact"], passes["run"], {}, [], []
    if len(steps) > 1:
        fix = f"--per_device_train_batch_size {pairs // args.world_size} --grad_cache_chunk_size {reference.piece}"
        n = pairs // len(steps)
        causes.append(f"each loss has {n - 1} negatives for a pair, not {pairs - 1} ({fix} has them)")
        columns["accumulation"] = expected, one
    elif probe.batch_norm and args.world_size > 1:
        causes.append("each process has statistics of its own")
        columns["BatchNorm"] = expected, one
    if probe.dropout:
        columns["dropout"] = run, passes.get("without dropout", exact)
        rates = {f"{name} {rate:g}" for _, name, rate in drop_rates(probe.trainer.model)}
        causes.append(f"the one batch is computed without it ({', '.join(sorted(rates))})")
        if not all(abs(slope - 1) < 0.03 for slope in probe.slopes):
            how = f"along the gradient the loss changes {min(probe.slopes):.2f} times as much as it should"
            faults.append(f"The backward pass does not repeat the random numbers of the forward pass: {how}")
    if probe.precision:
        judged = passes.get("without dropout", run)
        plainly, ours = rounding(reference(steps, probe.precision), expected), rounding(judged, exact)
        columns[probe.precision] = judged, exact
        causes.append(f"it rounds: by {plainly:.1e} in the plain model, by {ours:.1e} here")
        if not ours < 3 * plainly + TOLERANCE:
            faults.append(f"The error of {probe.precision}, {ours:.1e}, is more than its rounding")
    rows = [[batch.get("row") for batch in step] for step in inputs]
    if args.world_size > 1 and all(torch.equal(row, step[0]) for step in rows for row in step if row is not None):
        faults.append("All processes read the same pairs")
    if not same(exact, expected):
        alone = reference([batch for step in inputs for batch in step])
        small = reference([concatenate(step, pad, SMALL) for step in inputs])
        faults.append(explain(passes, expected, alone, small, args, len(steps)))
    counts = (len(steps), "accumulation steps"), (args.world_size, "processes")
    ways = [f"batches of {args.per_device_train_batch_size}", *(f"{n} {what}" for n, what in counts if n > 1)]
    ways += [f"chunks of {args.grad_cache_chunk_size}"] * (args.grad_cache_chunk_size > 0)
    print(f"{', '.join(ways)}, {probe.precision or 'fp32'}, against one fp32 batch of {pairs} pairs on one process")
    print(table(run, one, columns | {"unexplained": (exact, expected)}))
    for name, cause in zip(columns, causes):
        print(f"{name}: {cause}")
    if faults:
        raise InputError(f"the gradients of this run are wrong. {'. '.join(faults)}")
    print(f"the gradients are right: {'the rest' if columns else 'what differs'} is the rounding of fp32")


def explain(passes: dict[str, Pass], expected: Pass, alone: Pass, small: Pass, args, steps: int) -> str:
    """Names the most likely mistake that makes a step differ from what is expected."""
    exact, world = passes["exact"], args.world_size
    if not exact.agree:
        return "The processes end with different gradients: they are not averaged (DistributedDataParallel does that)"
    if args.grad_cache_chunk_size and same(passes["small"], small):
        return "GradCache (--grad_cache_chunk_size) is wrong: without chunks the gradients are right"
    if args.fast and not same(passes["small"], small) and same(passes["small plain"], small):
        return "The fast path is wrong: with --fast false the gradients are right"
    # The gradients of the embeddings tell whether the loss or the towers are wrong. A process has those of its rows.
    ours, right = ([g for step in p.embed_grads for g in step] for p in (exact, expected))
    kept = [(a.flatten() / world, b.flatten()) for a, b in zip(ours, right) if a is not None]
    cosine, error, factor = compare(*map(torch.cat, zip(*kept)))
    if error > TOLERANCE:
        if scaled := wrong_factor(cosine, factor, {"accumulation steps": steps, "processes": world}):
            return f"The loss {scaled}"
        if world > 1 and abs(exact.loss - alone.loss) < TOLERANCE * abs(alone.loss) and not same(alone, expected):
            return "Each process contrasts its pairs with its own only: the loss does not gather the others' embeddings"
        if world > 1 and abs(exact.loss - expected.loss) < TOLERANCE * abs(expected.loss):
            why = "gathers the others' embeddings without gradients (torch.distributed.all_gather passes none)"
            return f"The loss is right but its gradient is not: it {why}. Use miniclip.loss.gather"
    cosine, _, factor = compare(*vectors(exact, expected, expected.grads))
    if scaled := wrong_factor(cosine, factor, {"processes": world, "accumulation steps": steps}):
        return f"The gradient {scaled}"
    return f"No known cause explains it (loss {exact.loss:.6f}, expected {expected.loss:.6f})"


def wrong_factor(cosine: float, factor: float, counts: dict[str, int]) -> str | None:
    """Says that a gradient has the right direction but a wrong length, and which number it may come from."""
    if cosine < 1 - TOLERANCE or abs(factor - 1) < TOLERANCE:
        return None
    for name, n in counts.items():
        for times, mistake in ((n, "summed, not averaged"), (1 / n, "divided twice")):
            if n > 1 and abs(factor / times - 1) < TOLERANCE:
                return f"is {factor:.3g} times what it should be: over the {n} {name} it is {mistake}"
    return f"is {factor:.3g} times what it should be"


def vectors(a: Pass, b: Pass, names) -> tuple[Tensor, Tensor]:
    """Two gradients of these parameters as vectors; what has none in one of them counts as 0 there."""
    either = {name: torch.zeros_like(g).flatten() for name, g in (a.grads | b.grads).items() if name in names}
    found = ([p.grads[n].flatten() if n in p.grads else zero for n, zero in either.items()] for p in (a, b))
    return tuple(torch.cat([torch.zeros(0), *grads]).double() for grads in found)


def compare(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Cosine, relative error |a - b| / |b|, and the factor f with which f b is nearest to a."""
    a, b, tiny = a.double(), b.double(), 1e-300
    size, factor = b.norm().clamp_min(tiny), (a @ b / (b @ b).clamp_min(tiny)).item()
    return factor * (size / a.norm().clamp_min(tiny)).item(), ((a - b).norm() / size).item(), factor


def parts(*passes: Pass) -> dict[str, list[str]]:
    """The names of the parameters with a gradient, by part of the model."""
    found = {"image tower": [], "text tower": [], "projections": [], "logit scale": []}
    for name in sorted(set().union(*(p.grads for p in passes))):
        tower = {"visual": "image tower", "text": "text tower"}.get(name.partition(".")[0], "logit scale")
        found["projections" if PROJECTION.match(name) else tower].append(name)
    return {part: names for part, names in found.items() if names}


def errors(a: Pass, b: Pass) -> dict[str, float]:
    """|a - b| / |b| by part of the model; 0 where the difference is negligible beside the whole gradient."""
    negligible = max(NEGLIGIBLE[0] * vectors(a, b, b.grads)[1].norm(), NEGLIGIBLE[1])
    both = {part: vectors(a, b, names) for part, names in parts(a, b).items()}
    return {part: 0.0 if (x - y).norm() <= negligible else compare(x, y)[1] for part, (x, y) in both.items()}


def same(a: Pass, b: Pass) -> bool:
    """Whether two gradients differ by no more than the rounding of fp32, in each part of the model."""
    return all(error <= TOLERANCE for error in errors(a, b).values())  # False for NaN


def rounding(a: Pass, b: Pass) -> float:
    """The largest error of a part, without the scale: of a single number it is a matter of luck."""
    return max(error for part, error in errors(a, b).items() if part != "logit scale")


def table(run: Pass, one: Pass, columns: dict[str, tuple[Pass, Pass]]) -> str:
    """The gradients by part of the model: cosine and relative error, and what each cause contributes to the error."""
    rows = [["", "cosine", "error", *columns]]
    for part, names in parts(run, one).items():
        size = vectors(run, one, names)[1].norm().item()
        cosine, error, _ = compare(*vectors(run, one, names))
        shares = ((a - b).norm().item() / max(size, 1e-300) for a, b in (vectors(*p, names) for p in columns.values()))
        rows.append([part, f"{cosine:.6f}", *(f"{share:.1e}" for share in (error, *shares))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def concatenate(batches: list[dict[str, Tensor]], pad: int, rows: int | None = None) -> dict[str, Tensor]:
    """One batch of the first rows of several, whose token ids are padded to the same length."""
    ids = pad_sequence(
        [row for batch in batches for row in batch["input_ids"][:rows]], batch_first=True, padding_value=pad
    )
    names = batches[0].keys() - {"input_ids"}
    return {name: torch.cat([batch[name][:rows] for batch in batches]) for name in names} | {"input_ids": ids}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def exactly(model: MiniClip, args):
    """A context in which a trainer's towers compute in fp32 and uncompiled."""
    calls, bf16 = ExitStack(), args.bf16

    def enter(*_):
        calls.enter_context(torch.autocast(args.device.type, enabled=False))

    with ExitStack() as stack:
        for tower in (model.visual, model.text):
            stack.enter_context(tower.register_forward_pre_hook(enter))
            stack.enter_context(tower.register_forward_hook(lambda *_: calls.close(), always_call=True))
        stack.enter_context(full_precision())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        args.bf16 = False  # read by the wrapper of FSDP
        stack.callback(setattr, args, "bf16", bf16)
        yield
