"""What can stop a run, and what is left then?

    SIGTERM, Ctrl-C               the step is finished and a checkpoint saved: `--resume` goes on from it
    a loss or gradient that is
    no number                     the run ends before the weights take it, and the records of the batch are written down
    a data worker that dies       the run ends, and the sample that it was reading is named
    memory that is short          the run ends, and a batch size that fits is said

A process that is killed outright leaves its checkpoints, which are complete (`resume.py`).
"""

import gc
import json
import logging
import math
import multiprocessing
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback

from miniclip.run.checkpoints import check_checkpoint, check_same_run, checkpoints, last_checkpoint, save_checkpoint
from miniclip.run.out_of_memory import first_line, out_of_memory
from miniclip.utils.errors import InputError
from miniclip.utils.files import DamagedFile, check_manifest, write_text
from miniclip.utils.machine import return_freed_memory

logger = logging.getLogger(__name__)
GRACE = 30  # seconds that a data worker lives on when all processes of a run are told to end
TWICE = 2  # seconds within which the same message is not a second one


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
        self.trainer, self.signal, self.told, self.agreed, self.due = trainer, 0, 0.0, 0, False
        self.batches = []  # of this step: (loss, row numbers, token ids)

    # Signals

    @contextmanager
    def watching(self):
        """Within it SIGTERM and Ctrl-C have a checkpoint saved; the second one stops at once. What was ignored before,
        as Ctrl-C is in the background, stays so."""
        self.signal, self.agreed, self.due, before = 0, 0, False, {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
            before = {number: signal.signal(number, self.on_signal) for number in numbers}
        try:
            yield
        finally:
            self.end_workers()
            for number, handler in before.items():
                signal.signal(number, handler)

    def end_workers(self):
        """At its end a process would wait for data workers that live on, which `spare_workers` made patient."""
        pids = set(getattr(self.trainer.train_dataset, "reading", torch.zeros(0, 1))[:, 0].tolist())
        ours = [worker for worker in multiprocessing.active_children() if worker.pid in pids]
        quiet = ours and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if quiet else None  # that they end is no error now
        for worker in ours:
            worker.kill()
            worker.join()
        if before is not None:
            signal.signal(signal.SIGCHLD, before)

    def on_signal(self, number, frame):
        name, now = signal.Signals(number).name, time.monotonic()
        if self.signal and now - self.told < TWICE:  # clusters and launchers tell all processes, some of them twice
            return
        if self.signal:
            raise Interrupted(f"stopped by {name}, without another checkpoint", number)
        self.signal, self.told = number, now
        if hasattr(signal, "SIGCHLD"):  # data workers may end too: that must not break off the step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.trainer.is_world_process_zero():
            with suppress(OSError):  # of a pipe whose reader was told to end as well
                print(f"\n{name}: this step is finished and saved first; told again, it stops at once", file=sys.stderr)

    def on_step_begin(self, args, state, control, **kwargs):
        self.batches.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.signal
        if args.world_size > 1:  # one that was told stops all, after the same step
            told = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.agreed = int(told)
        # After the last step of an epoch there may be an evaluation, which belongs to what is saved.
        if self.agreed and abs(state.epoch - round(state.epoch)) > 1e-6:
            control.should_save = self.due = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = self.due = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise Interrupted(f"stopped after step {state.global_step}; --resume goes on from {folder}", self.agreed)

    # Numbers

    def saw(self, loss: Tensor, rows: Tensor | None, input_ids: Tensor | None):
        """A batch of this step, and its loss."""
        self.batches.append((loss.detach(), rows, input_ids))

    def check(self, grad_norm):
        """Raises NotFinite for a loss or gradients that are not, before the optimizer can take them. In fp16 an
        overflow of the gradients is no fault: the step is left out and the scale lowered."""
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # sharded by FSDP
        numbers = [torch.as_tensor(norm), *(loss for loss, _, _ in self.batches)]
        norm, *losses = torch.stack([n.to(self.trainer.args.device, torch.float32) for n in numbers]).tolist()
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
        chunk = args.grad_cache_chunk_size
        advice = "lower --per_device_train_batch_size, or add --grad_cache_chunk_size"
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
        return_freed_memory()  # what glibc keeps, other allocators may want


def spare_workers(loader):
    """Has the workers of a data loader, when they are told to end together with their run, first give that time to
    save. Gives the loader."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's is around the one that makes them
    inner.worker_init_fn = partial(_spare_worker, inner.worker_init_fn)
    return loader


def _spare_worker(init, worker_id: int):
    if init is not None:
        init(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class GuardedTrainer(Trainer):
    """A Trainer whose runs survive what this file's first lines list.

    `record` says what is run (`record.py`): it is kept in checkpoints, and compared when a run goes on from one.
    """

    def __init__(self, *args, record: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.record, self.guard, self.resumed_from = record, Guard(self), None
        self.add_callback(self.guard)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As Trainer's; True resumes from the newest checkpoint that is complete, or starts where there is none."""
        folder, there = resume_from_checkpoint, checkpoints(self.args.output_dir)
        if folder is True:
            folder = last_checkpoint(self.args.output_dir)
            if there and folder is None:
                raise InputError(
                    f"of the {len(there)} checkpoints in {self.args.output_dir} none can be gone on from, as is said"
                    f" above: start anew from the weights of one by --model {there[-1]} --output_dir ..., or"
                    " from nothing by --overwrite_output_dir"
                )
            logger.warning("resuming from %s", folder or "the start: there is no checkpoint yet")
        elif folder:
            check_checkpoint(folder)
        if len(set(gather_object([folder]))) > 1:
            raise InputError(f"not all processes see the same checkpoints: {self.args.output_dir} must be on one disk")
        if folder and self.record:
            check_same_run(folder, self.record)
        self.resumed_from = folder
        with self.guard.watching():
            try:
                return super().train(folder, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if meaning := self.guard.explained(error):
                    raise meaning from error
                raise

    def training_step(self, model, inputs, num_items_in_batch=None):
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or self.args.auto_find_batch_size:
                raise
            said = first_line(error)
        # Only here the exception is gone, and with it all that the failed pass had kept.
        raise self.guard.too_large(model, inputs, said)

    def _get_grad_norm(self, model, grad_norm=None):
        """Comes after the gradients of all processes are added, and before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.check(norm)
        return norm

    def get_batch_samples(self, *args, **kwargs):
        """Comes between two steps. Where the data workers were told to end and did so first, there is time to save."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        except RuntimeError as error:
            if not self.guard.signal or self.args.world_size > 1 or "DataLoader worker" not in str(error):
                raise
        self.guard.agreed = self.guard.signal
        self._save_and_stop()

    def _save_and_stop(self):
        self._save_checkpoint(self.model, None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.guard.due:  # `--save_strategy best` saves nothing else
            self._save_and_stop()

    def _run_epoch(self, *args, **kwargs):
        if not self.control.should_training_stop:  # it is a run that early stopping had ended
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        save_checkpoint(self)

    def _load_callback_state(self):
        """Comes when the state of a run that goes on has been read. Its folder may have been moved since."""
        super()._load_callback_state()
        best = Path(self.resumed_from).with_name(f"checkpoint-{self.state.best_global_step}")
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        try:
            check_manifest(best)
            self._load_from_checkpoint(best)
        except DamagedFile as error:
            logger.warning("the best checkpoint is damaged, and the last weights are kept in its place: %s", error)

    def _finalize_training(self, *args, **kwargs):
        """Without what Trainer deletes there: with a limit of one checkpoint, the newest."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
