"""What can stop a run, and what is left then?

    SIGTERM, Ctrl-C               the step is finished and a checkpoint saved: `--resume` goes on from it
    a loss or gradient that is
    no number                     the run ends before the weights take it, and the records of the batch are written down
    a data worker that dies       the run ends, and the sample that it was reading is named
    memory that is short          the run ends, and a batch size that fits is said

A process that is killed outright leaves its checkpoints, which are complete (`resume.py`).
"""

import ctypes
import gc
import json
import math
import re
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from miniclip.config import InputError
from miniclip.files import write_text

GRACE = 30  # seconds that a data worker lives on when all processes of a run are told to end


class Interrupted(KeyboardInterrupt):
    """A run was told to end, and has saved a checkpoint. `signal` is the number that told it."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class NotFinite(InputError, FloatingPointError):
    """A loss or a gradient is infinite, or no number; the message says where the records of the batch are."""


class Guard(TrainerCallback):
    """Watches over the training of a ClipTrainer, which makes it and tells it of its batches."""

    def __init__(self, trainer):
        self.trainer, self.signal, self.agreed = trainer, 0, False
        self.batches = []  # of this step: (loss, row numbers, token ids)

    # Signals

    @contextmanager
    def watching(self):
        """Within it SIGTERM and Ctrl-C have a checkpoint saved; the second one stops at once."""
        self.signal, self.agreed, before = 0, False, {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            before = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        name = signal.Signals(number).name
        if self.signal:
            raise Interrupted(f"stopped by {name}, without another checkpoint", number)
        self.signal = number
        if self.trainer.is_world_process_zero():
            say = f"\n{name}: this step is finished and saved first; once more stops at once"
            print(say, file=sys.stderr, flush=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.batches.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = bool(self.signal)
        if args.world_size > 1:  # one that was told stops all, after the same step
            told = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.agreed = bool(told)
        # After the last step of an epoch there may be an evaluation, which belongs to what is saved.
        if self.agreed and abs(state.epoch - round(state.epoch)) > 1e-6:
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise Interrupted(f"stopped after step {state.global_step}; --resume goes on from {folder}", self.signal)

    # Numbers

    def saw(self, loss: Tensor, rows: Tensor | None, input_ids: Tensor | None):
        """A batch of this step, and its loss."""
        self.batches.append((loss.detach(), rows, input_ids))

    def check(self, grad_norm):
        """Raises NotFinite for a loss or gradients that are not, before the optimizer can take them. In fp16 an
        overflow of the gradients is no fault: the step is left out and the scale lowered."""
        norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)  # sharded by FSDP
        losses = [loss.item() for loss, _, _ in self.batches]
        if all(map(math.isfinite, losses)) and (math.isfinite(norm) or self.trainer.args.fp16):
            return
        args, state = self.trainer.args, self.trainer.state
        step, rank = state.global_step + 1, f"-process{args.process_index}" if args.world_size > 1 else ""
        path = Path(args.output_dir) / f"nonfinite-step{step}{rank}.json"
        named = self.trainer.model.named_parameters()
        broken = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        bad = [name for name, p in self.trainer.model.named_parameters() if not p.isfinite().all()]
        rate, scale = self.trainer._get_learning_rate(), self.trainer.model.logit_scale.detach().float()
        about = {"step": step, "loss": losses, "grad_norm": norm, "learning_rate": rate}
        about |= {"logit_scale": math.exp(scale.sum()), "weights_not_finite": bad, "gradients_not_finite": broken}
        write_text(path, json.dumps(about | {"records": self.records()}, indent=1, ensure_ascii=False) + "\n")
        loss = sum(losses) / max(1, len(losses))
        for callback in self.trainer.callback_handler.callbacks:  # the log is to have it
            getattr(callback, "before_log", lambda logs: None)({"loss": loss, "grad_norm": norm, "learning_rate": rate})
        raise NotFinite(
            f"the loss is {loss} and the norm of its gradient {norm} at step {step}: the run ends before the weights"
            f" take it. The records of the batch are in {path}. Lower --learning_rate (now {rate:.3g}) or raise"
            " --warmup_steps; --resume goes on from the last checkpoint"
        )

    def records(self) -> list[dict]:
        """Picture and caption of all pairs of this step."""
        dataset, found = self.trainer.train_dataset, []
        for _, rows, input_ids in self.batches:
            n = len(rows) if rows is not None else 0 if input_ids is None else len(input_ids)
            for i in range(n):
                entry = dataset.label(rows[i].tolist()) if rows is not None and hasattr(dataset, "label") else {}
                if input_ids is not None:
                    entry.setdefault("caption", self.trainer.tokenizer.decode(input_ids[i].tolist()))
                found.append(entry)
        return found

    # Workers and memory

    def explained(self, error: BaseException) -> InputError | None:
        """What an exception in training means, if it is one of those above."""
        said = str(error)
        if "DataLoader worker" in said and (pids := re.search(r"pid(?:\(s\))? ([\d, ]+)", said)):
            dataset, dead = self.trainer.train_dataset, set(map(int, re.findall(r"\d+", pids[1])))
            reading = [row for pid, *row in getattr(dataset, "reading", torch.zeros(0)).tolist() if pid in dead]
            names = "; ".join(str(dataset.label(row)) for row in reading) or "nothing yet"
            return InputError(
                f"a data worker died ({first_line(error).strip(' .')}): the system killed it, for want of memory,"
                f" say, or a file made it crash. What it read last: {names}. Look at that sample, lower"
                " --dataloader_num_workers; --resume goes on"
            )
        if out_of_memory(error):
            return InputError(
                f"out of memory outside the model's passes ({first_line(error)}): the weights, their gradients and the"
                " optimizer's averages need more than there is, whatever the batch"
            )

    def too_large(self, model, inputs: dict, said: str) -> InputError:
        """For a batch that memory was short for: an error with a batch size that fits, tried by halves."""
        args, size = self.trainer.args, len(next(iter(inputs.values())))
        chunk, advice = args.grad_cache_chunk_size, "a smaller one"
        if chunk:
            fix = f"try --grad_cache_chunk_size {chunk // 2 or 1}"
            return InputError(f"out of memory in chunks of {chunk} ({said}): {fix}")
        if args.world_size == 1 and (fits := self.largest(model, inputs, size // 2)):
            advice = f"{fits} fit (tried): --per_device_train_batch_size {fits}, or --grad_cache_chunk_size {fits},"
            advice += f" which keeps the negatives of all {size}"
        elif args.world_size == 1:
            advice = "not even one pair fits: take a smaller model or image size"
        return InputError(f"out of memory with {size} pairs at once ({said}): {advice}")

    def largest(self, model, inputs: dict, size: int) -> int:
        """The largest half, quarter, ... of a batch that goes forward and back; 0 if none does."""
        trainer = self.trainer
        while size:
            self.free(model)
            held = [] if trainer.optimizer.state else [torch.empty_like(p) for p in model.parameters() for _ in "mv"]
            try:
                part = trainer._prepare_inputs({name: value[:size] for name, value in inputs.items()})
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, part)
                trainer.accelerator.backward(loss)
                return size
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            finally:
                held.clear()  # room that the optimizer will want
                loss = part = None
            size //= 2
        return 0

    def free(self, model):
        model.zero_grad(set_to_none=True)
        self.batches.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what glibc keeps, other allocators may want
            libc.malloc_trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was short, on a GPU or not."""
    known = ("can't allocate memory", "out of memory", "not enough memory", "could not create a")  # oneDNN
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in known)
    )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def spare_worker(init, worker_id: int):
    """For a data worker that starts: told to end together with its run, it first gives that time to save. (The main
    process gets an exception, in the midst of whatever it does, when a worker ends by a signal.)"""
    if init is not None:
        init(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))

