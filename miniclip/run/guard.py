"""Interruptions, NaN, dead data workers and resuming: when a run ends early, and what it leaves behind (docs/run.md).

SIGTERM and Ctrl-C finish the step and save a checkpoint. A NaN or infinite loss stops the run before the weights are
updated, a dead data worker names its sample, and an error about memory says which batch size fits."""

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
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from miniclip.run.checkpoints import check_checkpoint, checkpoints, last_checkpoint, save_checkpoint
from miniclip.run.resume import check_same_run, use_arguments
from miniclip.utils.errors import InputError, first_line
from miniclip.utils.files import DamagedFile, check_manifest, write_text
from miniclip.utils.machine import return_freed_memory

logger = logging.getLogger(__name__)
REPEAT = 2  # seconds within which another signal counts as the same one


class Interrupted(KeyboardInterrupt):
    """A signal, whose number is `signal`, ended the run."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class NotFinite(InputError, FloatingPointError):
    """A loss or gradient is NaN or infinite."""


class Guard(TrainerCallback):
    """Handles the signals, NaN and dead data workers of a GuardedTrainer."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.signal, self.signalled_at = 0, 0.0  # what signal this process received, and when
        self.agreed, self.due = 0, False  # the signal that all processes agreed on, and whether to save for it
        self.batches = []  # of this step: (loss, rows for RunDataset.label, token ids or None)

    @contextmanager
    def handle_signals(self):
        """Within it, the first SIGTERM or Ctrl-C saves a checkpoint and the second stops at once. Signals that were
        ignored before, as Ctrl-C is in the background, stay ignored."""
        self.signal, self.agreed, self.due = 0, 0, False
        before = {}
        main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
        for number in (signal.SIGTERM, signal.SIGINT) if main else ():
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, self.on_signal)
        try:
            yield
        finally:
            if main and hasattr(signal, "SIGCHLD"):  # torch's handler would raise an error
                before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pids = set(self.trainer.train_dataset.reading[:, 0].tolist())
            for worker in multiprocessing.active_children():
                if worker.pid in pids:  # `prepare_worker` made it outlive SIGTERM: the process would wait for it
                    worker.kill()
                    worker.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        name, now = signal.Signals(number).name, time.monotonic()
        if self.signal and now - self.signalled_at < REPEAT:  # clusters signal all processes, some of them twice
            return
        if self.signal:
            raise Interrupted(f"stopped by {name} without another checkpoint", number)
        self.signal, self.signalled_at = number, now
        if hasattr(signal, "SIGCHLD"):  # the data workers may end too, which must not interrupt the step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.trainer.is_world_process_zero():
            with suppress(OSError):  # the reader of the pipe may have ended as well
                print(f"\n{name}: finishing this step and saving; a second signal stops at once", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.signal
        if args.world_size > 1:  # a signal to one process stops all, after the same step
            received = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.agreed = int(received)
        if abs(state.epoch - round(state.epoch)) > 1e-6:  # after the last step an evaluation may come before saving
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = self.due = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise Interrupted(f"stopped after step {state.global_step}; --resume continues from {folder}", self.agreed)

    def check(self, grad_norm):
        """Raises NotFinite if a loss or the gradients of this step are NaN or infinite, before the optimizer applies
        them. In fp16 a gradient may overflow: Trainer skips that step and lowers the loss scale."""
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # sharded by FSDP
        numbers = [torch.as_tensor(norm), *(loss for loss, _, _ in self.batches)]
        norm, *losses = torch.stack([n.to(self.trainer.args.device, torch.float32) for n in numbers]).tolist()
        if all(map(math.isfinite, losses)) and (math.isfinite(norm) or self.trainer.args.fp16):
            self.batches.clear()
            return
        args, named = self.trainer.args, list(self.trainer.model.named_parameters())
        step, rank = self.trainer.state.global_step + 1, f"-process{args.process_index}" if args.world_size > 1 else ""
        path = Path(args.output_dir) / f"nonfinite-step{step}{rank}.json"
        rate, loss = self.trainer._get_learning_rate(), sum(losses) / max(1, len(losses))
        report = {
            "step": step, "loss": losses, "grad_norm": norm, "learning_rate": rate, "records": self.records(),
            "logit_scale": math.exp(self.trainer.model.logit_scale.detach().float().sum()),
            "weights_not_finite": [name for name, p in named if not p.isfinite().all()],
            "gradients_not_finite": [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()],
        }  # fmt: skip
        write_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        self.trainer.log({"loss": loss, "grad_norm": norm, "learning_rate": rate})
        what = f"the loss is {loss} and the gradient norm {norm} at step {step}, whose batch is listed in {path}"
        fix = f"Lower --learning_rate (now {rate:.3g}) or raise --warmup_steps, and --resume"
        raise NotFinite(f"{what}; the weights were not updated. {fix}")

    def records(self) -> list[dict]:
        """Image and caption of all pairs of this step."""
        dataset, tokenizer = self.trainer.train_dataset, self.trainer.data_collator.tokenize
        found = []
        for _, rows, input_ids in self.batches:
            for i, row in enumerate(rows.tolist()):
                found.append(dataset.label(row))
                if input_ids is not None:  # a stream does not remember its captions
                    found[-1].setdefault("caption", tokenizer.decode(input_ids[i].tolist()))
        return found

    def explain(self, error: BaseException) -> InputError | None:
        """What an exception in training means, if it is about a data worker or memory."""
        message = str(error)
        if "DataLoader worker" in message and (pids := re.search(r"pid(?:\(s\))? ([\d, ]+)", message)):
            dataset, dead = self.trainer.train_dataset, set(map(int, re.findall(r"\d+", pids[1])))
            reading = [row for pid, *row in dataset.reading.tolist() if pid in dead]
            names = "; ".join(str(dataset.label(row)) for row in reading) or "nothing yet"
            why = f"({first_line(error).strip(' .')}), perhaps out of memory or because of the last sample that it read"
            fix = "Check that sample or lower --dataloader_num_workers, and --resume"
            return InputError(f"a data worker died {why}: {names}. {fix}")
        if out_of_memory(error):
            outside = "outside the forward and backward pass, whatever the batch size"
            return InputError(f"out of memory {outside} ({first_line(error)}). Use a smaller model")


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU: that of torch, oneDNN or cuBLAS."""
    words = "can't allocate memory|out of memory|not enough memory|could not create a|STATUS_ALLOC_FAILED"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(words, str(error)) is not None


def batch_too_large(trainer, model, inputs: dict, cause: str) -> InputError:
    """Returns the error for a batch that did not fit (`cause`), with a batch size that does, found by halving."""
    args, size = trainer.args, len(next(iter(inputs.values())))
    if chunk := args.grad_cache_chunk_size:
        half = chunk // 2 or 1
        return InputError(f"out of memory in chunks of {chunk} ({cause}): try --grad_cache_chunk_size {half}")
    advice = "lower --per_device_train_batch_size" + ", or add --grad_cache_chunk_size" * args.chunks_help
    if args.world_size == 1:
        n = size // 2
        while n and not fits(trainer, model, {name: value[:n] for name, value in inputs.items()}):
            n //= 2
        chunks = f", or --grad_cache_chunk_size {n}, which keeps all {size} negatives" * args.chunks_help
        advice = f"{n} fit (tried). Use --per_device_train_batch_size {n}{chunks}"
        advice = advice if n else "not even one pair fits. Use a smaller model or image size"
    return InputError(f"out of memory with {size} pairs at once ({cause}): {advice}")


def fits(trainer, model, inputs: dict) -> bool:
    """Whether a forward and backward pass of a batch fits in memory, beside the state of the optimizer."""
    model.zero_grad(set_to_none=True)
    trainer.guard.batches.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return_freed_memory()  # other allocators may need what glibc keeps
    # The optimizer allocates its two averages in the first step: leave room for them.
    reserved = [p.new_empty(2, *p.shape) for p in model.parameters() if not trainer.optimizer.state]
    try:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
        trainer.accelerator.backward(loss)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    del reserved
    return True


class GuardedTrainer(Trainer):
    """A Trainer whose runs end and resume as described above. `run_metadata` is compared with a checkpoint's."""

    def __init__(self, *args, run_metadata: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_metadata, self.guard, self.resumed_from = run_metadata, Guard(self), None
        self.changed: dict[str, str] = {}  # what differs from the run of the checkpoint
        self.log_extras: list[Callable[[dict], None]] = []  # each adds to an entry of the log before it is written
        self.add_callback(self.guard)

    def log(self, logs: dict[str, float], *args, **kwargs):
        for extra in self.log_extras:
            extra(logs)
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As Trainer's. True resumes from the newest complete checkpoint, or starts if there is no checkpoint yet."""
        folder, there = resume_from_checkpoint, checkpoints(self.args.output_dir)
        if folder is True:
            folder = last_checkpoint(self.args.output_dir)
            if there and folder is None:
                fix = f"start anew from the weights (--model {there[-1]} --output_dir ...) or --overwrite_output_dir"
                none = f"none of the {len(there)} checkpoints in {self.args.output_dir} is usable"
                raise InputError(f"{none}, for the reasons above: {fix}")
            logger.warning("resuming from %s", folder or "the start: there is no checkpoint yet")
        elif folder:
            check_checkpoint(folder)
        if len(set(gather_object([folder]))) > 1:
            raise InputError(f"the processes see different checkpoints. Put {self.args.output_dir} on a shared disk")
        if folder and self.run_metadata:
            self.changed = check_same_run(folder, self.run_metadata)
        self.resumed_from = folder
        with self.guard.handle_signals():
            try:
                return super().train(folder, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if meaning := self.guard.explain(error):
                    raise meaning from error
                raise

    def training_step(self, model, inputs, num_items_in_batch=None):
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            cause = first_line(error)
        # Outside the except block: the exception held on to everything that the failed pass had allocated.
        raise batch_too_large(self, model, inputs, cause)

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer calls it when the gradients of all processes are summed, before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.check(norm)
        return norm

    def get_batch_samples(self, *args, **kwargs):
        """Trainer calls it between two steps: a run whose data workers were ended by the signal can still save."""
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
        if self.guard.due:  # `--save_strategy best` ignores should_save
            self._save_and_stop()

    def _run_epoch(self, *args, **kwargs):
        # A finished run that is resumed has no step left, and early stopping may have ended it before.
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        fresh = [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            use_arguments(self, fresh, self.changed)

    def _save_checkpoint(self, model, trial):
        save_checkpoint(self)

    def _load_callback_state(self):
        """Trainer calls it when it has read the state of a run to resume, whose folder may have been moved."""
        super()._load_callback_state()
        best = Path(self.resumed_from).with_name(f"checkpoint-{self.state.best_global_step}")
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_best_model(self):
        try:
            check_manifest(self.state.best_model_checkpoint)
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        except DamagedFile as error:
            logger.warning("the best checkpoint is damaged, so the last weights are kept: %s", error)

    def _finalize_training(self, *args, **kwargs):
        """As Trainer's, without its clean-up: with a limit of one checkpoint it deletes the newest."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
