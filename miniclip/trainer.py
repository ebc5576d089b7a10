"""How is CLIP trained? By the Hugging Face Trainer, with the few hooks that a contrastive model needs changed."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from miniclip.data import CaptionDataset, Collator
from miniclip.loss import clip_loss, clip_loss_with_duplicates
from miniclip.model import MAX_LOGIT_SCALE, ClipOutput, MiniClip
from miniclip.utils.push import NoFolderUpload


@dataclass
class ClipTrainingArguments(TrainingArguments):
    """The Hugging Face training arguments, with CLIP's defaults for training from random weights."""

    learning_rate: float = 1e-3  # to fine-tune: 1e-5
    weight_decay: float = 0.2
    num_train_epochs: float = 30.0
    per_device_train_batch_size: int = 128  # every other pair of the batch is a negative
    warmup_steps: float = 0.05  # share of all steps
    lr_scheduler_type: str = "cosine"
    adam_beta2: float = 0.98  # as OpenCLIP: a contrastive loss's gradients change fast, so a shorter memory than 0.999
    adam_epsilon: float = 1e-6
    logging_nan_inf_filter: bool = False  # it would log NaN as 0 and train on
    dataloader_pin_memory: bool = torch.cuda.is_available()  # without a GPU torch warns that it cannot
    dataloader_drop_last: bool = True  # every batch, on every process, has the same number of negatives
    remove_unused_columns: bool = False  # the collator makes what the loss reads
    ddp_find_unused_parameters: bool = False  # every parameter is used in every step

    def __post_init__(self):
        if self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau":
            self.metric_for_best_model = self.metric_for_best_model or "mean_recall"
        if self.greater_is_better is None:
            self.greater_is_better = not (self.metric_for_best_model or "").endswith("_rank")
        super().__post_init__()


class ClipTrainer(NoFolderUpload, Trainer):
    """Trains a MiniClip on a CaptionDataset.

    `loss(outputs, batch)` is CLIP's unless given: every other pair of the batch, on any process, is a negative.
    `evaluator(model)` returns metrics by name, a `RetrievalEvaluator` for example. Everything else is Trainer's."""

    loss_is_scaled_for_ga = False  # our loss is a mean: with gradient accumulation Trainer has to divide it

    def __init__(
        self, model: MiniClip, args: ClipTrainingArguments, train_dataset: CaptionDataset | None = None, *, tokenizer,
        loss: Callable[[ClipOutput, dict[str, Tensor]], Tensor] | None = None,
        evaluator: Callable[[MiniClip], dict[str, float]] | None = None, **kwargs,
    ):  # fmt: skip
        collator = Collator(tokenizer, multiple=1 if args.device.type == "cpu" else 8)
        super().__init__(model, args, collator, train_dataset, evaluator and [evaluator], **kwargs)
        self.loss, self.evaluator = loss or contrastive_loss, evaluator
        self.add_callback(ContrastiveCallback(model, train_dataset))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["pixel_values"], inputs["input_ids"])
        loss = self.loss(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices that multiply: not for gains, biases, the temperature and positions."""
        return [n for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("positional_embedding")]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Retrieval over the whole evaluation set, not batch by batch: the more images, the harder the search."""
        metrics = self.evaluator(self.accelerator.unwrap_model(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log({n: value for n, value in metrics.items() if not re.search("_precision@|_recall@|_mean_rank|_MRR", n)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        """Trainer saves the bare weights of a model that is not its own; ours go with their config."""
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Strictly: Trainer's own goes on with random numbers where a weight is missing."""
        weights = load_file(f"{resume_from_checkpoint}/model.safetensors")
        self.accelerator.unwrap_model(model or self.model).load_state_dict(weights, strict=True)


def contrastive_loss(outputs: ClipOutput, batch: dict[str, Tensor], duplicates: str = "positive") -> Tensor:
    """CLIP's loss, in which an image or caption that occurs twice in a batch is not its own negative."""
    ids = batch.get("pair_ids")
    return clip_loss(*outputs[:3]) if ids is None else clip_loss_with_duplicates(*outputs[:3], ids, duplicates)


class ContrastiveCallback(TrainerCallback):
    """Between steps: new captions and crops each epoch, and a logit scale of at most 100."""

    def __init__(self, model: MiniClip, train_dataset: CaptionDataset | None):
        self.model, self.train_dataset = model, train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.train_dataset.set_epoch(int(state.epoch + 1e-6))  # draws from (seed, epoch, index): resumable exactly

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(hash((args.seed, state.global_step, args.process_index)))  # so is patch dropout

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.model.logit_scale.requires_grad:
            self.model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)  # in `forward`: no gradient above, no way back
