"""A check of a run's gradients: its first step as it would be trained, against one big fp32 batch of the plain model.

The steps are those of `gradient_passes.py`. Dropout and low precision make "run" and "exact" differ, accumulation
"expected" and "one batch". Those in the middle have to be equal, up to the rounding of fp32: a difference there is a
mistake, whose cause `explain` looks for."""

import copy
import math
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from miniclip.training.finetune import drop_rates
from miniclip.training.gradient_passes import SMALL, TOLERANCE, Measured, Pass, Probe, Reference, concatenate
from miniclip.utils.errors import InputError

LOSS_SCALE = "loss scale of fp16"
NEGLIGIBLE = 1e-5, 1e-6  # of the whole gradient, and of a loss of about 1: smaller differences are not judged
TINY = 1e-300  # instead of a division by 0
PROJECTION = re.compile(r"visual\.proj\b|text\.(text_projection|proj)\b")


class WrongGradients(InputError):
    """Gradients that differ for another reason than accumulation, rounding and dropout; `figures` say by how much."""

    def __init__(self, message: str, figures: dict[str, dict[str, float]]):
        super().__init__(message)
        self.figures = figures


def check_gradients(trainer) -> dict[str, dict[str, float]] | None:
    """Compares the gradients of a trainer's first step with those of one big fp32 batch, prints a table, and returns
    its `figures` in the first process. Raises WrongGradients if they differ by more than accumulation, rounding and
    dropout make, and InputError for a loss that is not finite. Weights and random numbers stay as they are; a process
    group is ended. No optimizer step is made, and nothing is written."""
    args, model = trainer.args, trainer.model
    plain = copy.deepcopy(model, copies := {}) if trainer.is_world_process_zero() else None
    probe = Probe(trainer)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    max_grad_norm = args.max_grad_norm
    args.max_grad_norm = 0  # clipping would hide a wrong factor
    trainer.loss = probe.recorded_loss
    trainer.add_callback(probe)
    with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
        try:
            trainer.train()
        except Measured:
            inputs = probe.inputs()
        except FloatingPointError:
            raise InputError("the first step's loss or gradient is NaN or infinite; training lists its batch") from None
        finally:
            trainer.remove_callback(probe)
            trainer.loss, args.max_grad_norm = probe.loss, max_grad_norm
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
        if dist.is_initialized():
            dist.destroy_process_group()  # from here on the loss is that of one process
        if plain is not None:
            piece = (not probe.batch_norm and args.grad_cache_chunk_size) or args.per_device_train_batch_size
            loss = probe.loss  # a partial of the model's own parts, as superclip's, then has those of the copy
            loss = copy.deepcopy(loss, copies) if isinstance(loss, partial) else loss
            return report(probe, Reference(plain, loss, trainer.normalize, args.device, piece), inputs, args)


def report(probe: Probe, reference: Reference, inputs: list[list[dict[str, Tensor]]], args) -> dict:
    """Prints the table and the causes. Returns its figures. Raises WrongGradients for a difference without a cause."""
    pad = probe.trainer.data_collator.tokenize.pad_token_id
    steps = [concatenate(step, pad) for step in inputs]
    everything = concatenate(steps, pad)
    count = len(everything["pixel_values"])
    expected = reference(steps)
    piece = count if probe.batch_norm else reference.piece
    one = expected if len(steps) == 1 and piece == reference.piece else reference([everything], piece=piece)
    exact, run = probe.passes["exact"], probe.passes["run"]
    columns: dict[str, tuple[Pass, Pass]] = {}  # what explains a difference -> the passes with it and without
    causes, faults = [], []  # sentences: on each of the columns, and on what nothing explains
    if len(steps) > 1:
        fix = f"--per_device_train_batch_size {count // args.world_size}"
        fix += f" --grad_cache_chunk_size {reference.piece}" * args.chunks_help
        n = count // len(steps)
        causes.append(f"each loss has {n - 1} negatives for a pair, not {count - 1} ({fix} has them)")
        columns["accumulation"] = expected, one
    elif probe.batch_norm and args.world_size > 1:
        causes.append("each process has statistics of its own")
        columns["BatchNorm"] = expected, one
    if probe.dropout:
        columns["dropout"] = run, probe.passes.get("without dropout", exact)
        rates = {f"{name} {rate:g}" for _, name, rate in drop_rates(probe.trainer.model)}
        causes.append(f"the one batch is computed without it ({', '.join(sorted(rates))})")
        if not all(abs(slope - 1) < 0.03 for slope in probe.slopes):
            how = f"along the gradient the loss changes {min(probe.slopes):.2f} times as much as it should"
            faults.append(f"The backward pass does not repeat the random numbers of the forward pass: {how}")
    low = probe.precision
    judged = probe.passes.get("without dropout", run)
    if low == "tf32" and not rounding(judged, exact):
        low = None  # torch's default, for convolutions alone, of which the fast path has none
    before, scale = probe.scales
    if low:
        plainly, ours = rounding(reference(steps, low, scale), expected), rounding(judged, exact)
        columns[low] = judged, exact
        skipped = f". Trainer skips steps that overflow, like this one with a loss scale above {scale:g}"
        causes.append(f"it rounds: by {plainly:.1e} in the plain model, by {ours:.1e} here{skipped * (scale < before)}")
        if not ours < 3 * plainly + TOLERANCE:
            faults.append(f"The error of {low}, {ours:.1e}, is more than its rounding")
    rows = [[batch.get("row") for batch in step] for step in inputs]
    if args.world_size > 1 and all(torch.equal(row, step[0]) for step in rows for row in step if row is not None):
        faults.append("All processes read the same pairs")
    if not same(exact, expected):
        alone = reference([batch for step in inputs for batch in step])
        small = reference([concatenate(step, pad, SMALL) for step in inputs])
        faults.append(explain(probe, expected, alone, small, args, len(steps)))
    counts = (len(steps), "accumulation steps"), (args.world_size, "processes")
    ways = [f"batches of {args.per_device_train_batch_size}", *(f"{n} {what}" for n, what in counts if n > 1)]
    ways += [f"chunks of {args.grad_cache_chunk_size}"] * (args.grad_cache_chunk_size > 0)
    print(f"{', '.join(ways)}, {low or 'fp32'}, against one fp32 batch of {count} pairs on one process")
    shown = figures(run, one, columns | {"unexplained": (exact, expected)})
    print(table(shown))
    for name, cause in zip(columns, causes):
        print(f"{name}: {cause}")
    if faults:
        raise WrongGradients(f"the gradients of this run are wrong. {'. '.join(faults)}", shown)
    print(f"the gradients are right: {'the rest' if columns else 'what differs'} is the rounding of fp32")
    return shown


def explain(probe: Probe, expected: Pass, alone: Pass, small: Pass, args, steps: int) -> str:
    """Names the most likely mistake that makes a step differ from what is expected."""
    passes, world = probe.passes, args.world_size
    exact = passes["exact"]
    if not exact.agree:
        return "The processes end with different gradients: they are not averaged (DistributedDataParallel does that)"
    if args.grad_cache_chunk_size and same(passes["small"], small):
        why = "a BatchNorm has the statistics of a chunk"
        why = why if probe.batch_norm else "without chunks the gradients are right"
        return f"GradCache (--grad_cache_chunk_size) is wrong: {why}"
    if args.fast and not same(passes["small"], small) and same(passes["small plain"], small):
        return "The fast path is wrong: with --fast false the gradients are right"
    # The gradients of the embeddings tell whether the loss or the towers are wrong. A process has those of its rows.
    ours, right = ([g for step in p.embed_grads for g in step] for p in (exact, expected))
    cosine, error, factor, *_ = compare((a / world, b) for a, b in zip(ours, right) if a is not None)
    if error > TOLERANCE:
        if scaled := wrong_factor(cosine, factor, {"accumulation steps": steps, "processes": world}):
            return f"The loss {scaled}"
        if world > 1 and abs(exact.loss - alone.loss) < TOLERANCE * abs(alone.loss) and not same(alone, expected):
            return "Each process contrasts its pairs with its own only: the loss does not gather the others' embeddings"
        if world > 1 and abs(exact.loss - expected.loss) < TOLERANCE * abs(expected.loss):
            why = "gathers the others' embeddings without gradients (torch.distributed.all_gather passes none)"
            return f"The loss is right but its gradient is not: it {why}. Use miniclip.loss.gather"
    cosine, _, factor, *_ = compare(pairs_of(exact, expected, expected.grads))
    counts = {"processes": world, "accumulation steps": steps, LOSS_SCALE: probe.scales[1]}
    if scaled := wrong_factor(cosine, factor, counts):
        return f"The gradient {scaled}"
    return f"No known cause explains it (loss {exact.loss:.6f}, expected {expected.loss:.6f})"


def wrong_factor(cosine: float, factor: float, counts: dict[str, int]) -> str | None:
    """Says that a gradient has the right direction but a wrong length, and which number it may come from."""
    if cosine < 1 - TOLERANCE or abs(factor - 1) < TOLERANCE:
        return None
    for name, n in counts.items():
        for times, mistake in ((n, "summed, not averaged"), (1 / n, "divided twice")):
            if n > 1 and abs(factor / times - 1) < TOLERANCE:
                what = f"over the {n} {name} it is {mistake}"
                if name == LOSS_SCALE:
                    what = f"the {name} is {'not divided out' if times == n else 'divided out twice'}"
                return f"is {factor:.3g} times what it should be: {what}"
    return f"is {factor:.3g} times what it should be"


class Compared(NamedTuple):
    """How far a is from b: f b is nearest to a, and the error is relative to |b|."""

    cosine: float
    error: float
    factor: float
    size: float  # |b|
    distance: float  # |a - b|


def compare(pairs: Iterable[tuple[Tensor, Tensor]]) -> Compared:
    """Compares two vectors whose parts these are, without making copies of them."""
    squares = torch.zeros(3, dtype=torch.float64)
    for x, y in pairs:
        squares += torch.stack([torch.linalg.vector_norm(v, dtype=torch.float64) for v in (x, y, x - y)]).square()
    a, b, distance = squares.sqrt().tolist()
    aa, bb, dd = squares.tolist()
    product = (aa + bb - dd) / 2
    return Compared(product / max(a * b, TINY), distance / max(b, TINY), product / max(bb, TINY), b, distance)


def pairs_of(a: Pass, b: Pass, names) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of these parameters; what has none in one of them counts as 0 there."""
    zero = torch.zeros(())
    return ((a.grads.get(name, zero), b.grads.get(name, zero)) for name in names)


def parts(*passes: Pass) -> dict[str, list[str]]:
    """The names of the parameters with a gradient, by part of the model."""
    found = {"image tower": [], "text tower": [], "projections": [], "logit scale": []}
    for name in sorted(set().union(*(p.grads for p in passes))):
        tower = {"visual": "image tower", "text": "text tower"}.get(name.partition(".")[0], "logit scale")
        found["projections" if PROJECTION.match(name) else tower].append(name)
    return {part: names for part, names in found.items() if names}


def errors(a: Pass, b: Pass) -> dict[str, float]:
    """|a - b| / |b| by part of the model; 0 where the difference is negligible beside the whole gradient."""
    found = {part: compare(pairs_of(a, b, names)) for part, names in parts(a, b).items()}
    negligible = max(NEGLIGIBLE[0] * math.hypot(*(c.size for c in found.values())), NEGLIGIBLE[1])
    return {part: 0.0 if c.distance <= negligible else c.error for part, c in found.items()}


def same(a: Pass, b: Pass) -> bool:
    """Whether two gradients differ by no more than the rounding of fp32, in each part of the model."""
    return all(error <= TOLERANCE for error in errors(a, b).values())  # False for NaN


def rounding(a: Pass, b: Pass) -> float:
    """The largest error of a part, without the scale: of a single number it is a matter of luck."""
    return max(error for part, error in errors(a, b).items() if part != "logit scale")


def figures(run: Pass, one: Pass, columns: dict[str, tuple[Pass, Pass]]) -> dict[str, dict[str, float]]:
    """The gradients by part of the model: cosine and relative error, and what each cause contributes to the error."""
    found = {}
    for part, names in parts(run, one).items():
        cosine, error, _, size, _ = compare(pairs_of(run, one, names))
        shares = (compare(pairs_of(*passes, names)).distance / max(size, TINY) for passes in columns.values())
        found[part] = {"cosine": cosine, "error": error} | dict(zip(columns, shares))
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The figures as text, a line for each part of the model."""
    rows = [["", *next(iter(found.values()))]]
    for part, (cosine, *errors) in ((part, row.values()) for part, row in found.items()):
        rows.append([part, f"{cosine:.6f}", *(f"{error:.1e}" for error in errors)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
