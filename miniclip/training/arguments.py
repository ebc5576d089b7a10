"""Training arguments of a real run: those of the core, with precision, workers and device chosen by the machine."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch

from miniclip.trainer import ClipTrainingArguments
from miniclip.training.check_arguments import MEASURED, check_after, check_before
from miniclip.utils.command_line import option
from miniclip.utils.errors import InputError
from miniclip.utils.machine import CORES

logger = logging.getLogger(__name__)
CUDA = torch.cuda.is_available()


@dataclass
class RunArguments(ClipTrainingArguments):
    """ClipTrainingArguments for RunTrainer and train.py. Raises InputError for what cannot work or does nothing."""

    bf16: bool | None = None  # by default on a CUDA device that computes in it
    dataloader_num_workers: int = min(8, CORES if CUDA else CORES // 5)  # few cores are better spent on training
    dataloader_persistent_workers: bool | None = None  # by default if any: they start while the trainer is small
    use_cpu: bool = not torch.accelerator.is_available()  # explicitly, so that --bf16 is allowed there
    save_total_limit: int | None = 2
    per_device_eval_batch_size: int = 64
    logging_steps: float | None = None  # by default 10, and in short runs fewer, so that these have a curve too
    do_train: bool = True
    fast: bool = option(True, "compute the same numbers with less work (miniclip/inference/fast.py)")
    grad_cache_chunk_size: int = option(0, "pairs in the towers at once (GradCache), for large batches; 0: all")
    chunks_help: ClassVar[bool] = True  # whether a run may have such chunks, so that they can be advised

    def __post_init__(self):
        check_before(self)
        self.logs_by_length = self.logging_steps is None
        self.logging_steps = 10 if self.logs_by_length else self.logging_steps
        if self.save_strategy == "best" or self.lr_scheduler_type in MEASURED:
            self.metric_for_best_model = self.metric_for_best_model or "mean_recall"
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.bf16 is None:
            self.bf16 = CUDA and not self.use_cpu and not self.fp16 and torch.cuda.is_bf16_supported(False)  # natively
        if self.use_cpu:
            self.dataloader_pin_memory = False
        if CUDA and self.accelerator_config is None:
            self.accelerator_config = {"non_blocking": True}  # what pinned memory is for
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            raise InputError(" ".join(str(error).split())) from error
        check_after(self)
        if self.n_gpu > 1:
            logger.warning("%d GPUs are visible but one is used: start with torchrun to use all", self.n_gpu)
            self._n_gpu = 1  # Trainer would wrap the model in DataParallel, which splits the negatives
