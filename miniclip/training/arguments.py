"""The Hugging Face training arguments with defaults for CLIP."""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import TrainingArguments

from miniclip.retrieval import retrieval_metrics
from miniclip.utils.errors import InputError
from miniclip.utils.machine import CORES

logger = logging.getLogger(__name__)
CUDA = torch.cuda.is_available()


@dataclass
class ClipTrainingArguments(TrainingArguments):
    """The Hugging Face training arguments, with defaults for CLIP. Rates and sizes: `miniclip/training/defaults.py`."""

    # OpenCLIP's values for vision transformers: a shorter memory of squared gradients than AdamW's 0.999, since the
    # gradients of a contrastive loss change fast.
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 10  # small data means few steps, and a NaN loss is noticed when it is logged
    bf16: bool | None = None  # by default, on CUDA devices that support it
    dataloader_pin_memory: bool = CUDA
    # With few cores, training needs all of them; with many, some should read images.
    dataloader_num_workers: int = min(8, CORES if CUDA else CORES // 5)
    use_cpu: bool = not torch.accelerator.is_available()  # if it is set, Trainer allows --bf16 on a CPU
    # Every batch has the same number of negatives, also on each process, as gathering requires.
    dataloader_drop_last: bool = True
    ddp_find_unused_parameters: bool = False  # every parameter is used in every step
    remove_unused_columns: bool = False  # the collator makes the columns that `forward` takes
    logging_nan_inf_filter: bool = False  # it would log NaN as 0 and hide it
    save_total_limit: int | None = 2
    per_device_eval_batch_size: int = 64
    fast: bool = field(default=True, metadata={"help": "compute the same numbers faster (miniclip/inference/fast.py)"})
    grad_cache_chunk_size: int = field(
        default=0, metadata={"help": "pairs per forward pass (GradCache): a large batch then needs little memory"}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = CUDA and not self.use_cpu and not self.fp16 and torch.cuda.is_bf16_supported()
        if CUDA and self.accelerator_config is None:
            self.accelerator_config = {"non_blocking": True}  # what pinned memory is for
        by_metric = self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau"
        if by_metric and self.metric_for_best_model is None:
            self.metric_for_best_model = "mean_recall"
        metric = (self.metric_for_best_model or "mean_recall").removeprefix("eval_")
        known = retrieval_metrics(np.eye(1, dtype=np.float32), np.eye(1, dtype=np.float32), [0])
        if metric not in known:
            raise InputError(f"metric_for_best_model {metric!r} is not one of {', '.join(known)}")
        if self.greater_is_better is None:
            self.greater_is_better = not metric.endswith("_rank")  # Trainer only knows losses
        super().__post_init__()
        if self.n_gpu > 1:
            logger.warning("%d GPUs are visible, but only one is used. Start with torchrun to use all", self.n_gpu)
            self._n_gpu = 1  # Trainer would wrap the model in DataParallel, which splits the negatives
        if self.gradient_accumulation_steps > 1:
            pairs = self.per_device_train_batch_size
            logger.warning(
                "gradient accumulation averages the losses of %d pairs each and adds no negatives. For a large batch"
                " in as little memory, use --per_device_train_batch_size %d --grad_cache_chunk_size %d",
                pairs, pairs * self.gradient_accumulation_steps, pairs,
            )  # fmt: skip
