"""How is CLIP trained? By the Hugging Face Trainer, with the few hooks that a contrastive model needs changed."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from miniclip.data import CaptionDataset, Collator
from miniclip.datasets.records import flatten_captions
from miniclip.inference.embed import embed_images, embed_texts, on_all_processes
from miniclip.inference.fast import fast_model, speed_up
from miniclip.inference.matmul import fast_arithmetic
from miniclip.loss import clip_loss
from miniclip.model import MAX_LOGIT_SCALE, MiniClip
from miniclip.retrieval import retrieval_metrics
from miniclip.run.guard import GuardedTrainer, spare_workers
from miniclip.training.arguments import ClipTrainingArguments
from miniclip.training.fsdp import load_whole_weights, prepare_fsdp, uses_fsdp, whole_model, with_scalars
from miniclip.training.grad_cache import batch_forward
from miniclip.utils.errors import InputError
from miniclip.utils.machine import keep_freed_memory

logger = logging.getLogger(__name__)


class ClipTrainer(GuardedTrainer):
    """Trains a MiniClip on a CaptionDataset and evaluates it on records (`read_captions`), by Recall@K.

    `preprocess` is the evaluation pipeline, `caches` has feature caches for the images and texts of locked towers.
    `objective` is the loss where it is not CLIP's: called with the model's outputs, the pairs' ids and the batch.
    `lr_scale` gives the factor of the learning rate for a parameter's name. `ema`, a model of the same shape whose
    weights somebody keeps as an average of those that learn, is measured in their place and kept in checkpoints.
    Everything else is Trainer's, guarded (`guard.py`).
    """

    loss_is_scaled_for_ga = False  # our loss is a mean: with gradient accumulation Trainer has to divide it

    def __init__(
        self,
        model: MiniClip,
        args: ClipTrainingArguments,
        train_dataset: CaptionDataset | None = None,
        eval_dataset: list[dict] | None = None,
        *,
        preprocess,
        tokenizer,
        caches=(None, None),
        objective=None,
        lr_scale: Callable[[str], float] | None = None,
        ema: MiniClip | None = None,
        **kwargs,
    ):
        self.sharded = uses_fsdp(args)
        if args.fast and not self.sharded:  # which counts on every block being called as a whole
            speed_up(model)
        model.forward = partial(batch_forward, model, preprocess.normalize, args.grad_cache_chunk_size)
        collator = Collator(tokenizer, 1 if args.device.type == "cpu" else 8)
        towers = [t for t in (model.visual, model.text) if hasattr(t, "trunk")]
        if any(p.requires_grad for tower in towers for p in tower.trunk.parameters()):
            args.ddp_find_unused_parameters = True  # encoders of others have parts that nothing here reads
        moving = (isinstance(m, _BatchNorm) and m.training for m in model.train().modules())
        if args.grad_cache_chunk_size and any(moving):
            raise InputError(
                "a BatchNorm that learns takes its statistics from a chunk, not from the batch: leave out"
                " grad_cache_chunk_size, or lock the image tower or all but its last blocks"
            )
        super().__init__(model, args, collator, train_dataset, eval_dataset, **kwargs)
        if self.sharded:
            prepare_fsdp(self)
        self.preprocess, self.tokenizer, self.caches = preprocess, tokenizer, caches
        self.objective = objective or (lambda outputs, ids, inputs: clip_loss(*outputs[:3], ids))
        self.lr_scale, self.ema = lr_scale, ema
        self.add_callback(_Hooks(model, train_dataset))
        batch = self.get_total_train_batch_size(args) // args.gradient_accumulation_steps
        if train_dataset is not None and has_length(train_dataset):  # a stream may have none
            sampler = self._own_sampler()
            n = len(train_dataset if sampler is None else sampler)
            if n < (batch if args.dataloader_drop_last else 1):
                raise InputError(f"{n} images make no batch of {batch}: lower per_device_train_batch_size")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The contrastive loss of a batch. What occurs in it twice is no negative of itself."""
        inputs = dict(inputs)
        ids = inputs.pop("pair_ids", None)  # data without them has no duplicates that could be known
        rows = inputs.pop("row", None)
        outputs = model(**inputs)
        loss = self.objective(outputs, ids, inputs)
        self.guard.saw(loss, rows, inputs.get("input_ids"))
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        """The dataset's own order, if it has one."""
        sampler = self._own_sampler()
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _own_sampler(self):
        make = getattr(self.train_dataset, "sampler", None)
        return make and make(self.args)

    def get_train_dataloader(self):
        """As Trainer's, but for a dataset that makes its own: a stream, of which each process reads its share."""
        make = getattr(self.train_dataset, "dataloader", None)
        return spare_workers(make(self.args, self.data_collator) if make else super().get_train_dataloader())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices that multiply: not for gains, biases, the temperature and positions."""
        return [n for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("positional_embedding")]

    def create_optimizer(self, model=None):
        """Trainer's, its groups divided into some of one rate each, the fastest, whose rate is logged, first."""
        divide = self.optimizer is None and self.lr_scale is not None
        super().create_optimizer(model)
        if divide:
            names = {p: name for name, p in (self.model if model is None else model).named_parameters()}
            groups = {}
            for number, group in enumerate(self.optimizer.param_groups):
                for p in group["params"]:
                    scale = self.lr_scale(names[p])
                    same = {**group, "params": [], "lr": scale * group["lr"]}
                    groups.setdefault((-scale, number), same)["params"].append(p)
            self.optimizer.param_groups = [groups[key] for key in sorted(groups)]
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Retrieval over the whole evaluation set, not batch by batch: among more images the search is harder, so
        that figures from batches could not be compared with anybody's."""
        records = self.eval_dataset if eval_dataset is None else eval_dataset
        image_embeds, text_embeds, image_of_text = self.embed_records(records)
        metrics = retrieval_metrics(image_embeds, text_embeds, image_of_text)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        # All are returned, to choose the best model by; the log gets those that one would watch.
        self.log({name: v for name, v in metrics.items() if any(m in name for m in ("_R@", "median", "mean_recall"))})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def embed_records(self, records: list[dict]):
        """The embeddings of all images and all captions, in the precision of training; evaluate.py measures in fp32."""
        model = self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema
        model = whole_model(model, self.args.device) if self.sharded else model
        # What goes into a feature cache is of full precision: later runs read it.
        model = fast_model(model, "bf16" if self.args.bf16 and self.caches == (None, None) else "fp32")
        size, workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers or None
        images = [record["image"] for record in records]
        texts, image_of_text = flatten_captions(records)
        image_cache, text_cache = self.caches
        embed = partial(embed_images, model, self.preprocess, batch_size=size, num_workers=workers, cache=image_cache)
        image_embeds = on_all_processes(self.args, images, embed)
        embed = partial(embed_texts, model, self.tokenizer, batch_size=size, cache=text_cache)
        return image_embeds, on_all_processes(self.args, texts, embed), image_of_text

    def log(self, logs: dict[str, float], *args, **kwargs):
        """What watches the run may add to an entry."""
        for callback in self.callback_handler.callbacks:
            getattr(callback, "before_log", lambda logs: None)(logs)
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As Trainer's; True resumes from the newest checkpoint that is complete. What may stop it: `guard.py`."""
        if self.args.fast and self.args.device.type == "cpu" and not self.args.grad_cache_chunk_size:
            keep_freed_memory()
        with fast_arithmetic(self.args.device) if self.args.fast else nullcontext():
            return super().train(resume_from_checkpoint, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        """Trainer saves bare weights of a model that is not its own; ours go with their config."""
        if not self.args.should_save:  # every process comes here, one writes
            return
        output_dir = output_dir or self.args.output_dir
        if state_dict:  # put together by FSDP, for which the scale is no scalar
            state_dict = with_scalars(state_dict, ())
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict)
        if self.ema is not None and self.is_in_train:
            save_file(self.ema.state_dict(), os.path.join(output_dir, "ema.safetensors"), metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Strictly: Trainer's own goes on with random numbers where a weight is missing."""
        weights = load_file(os.path.join(resume_from_checkpoint, "model.safetensors"))
        if self.sharded:
            return load_whole_weights(self.model, weights)
        self.accelerator.unwrap_model(model or self.model).load_state_dict(weights, strict=True)
        average = Path(resume_from_checkpoint) / "ema.safetensors"
        if average.is_file() != (self.ema is not None):
            how = "with --ema: go on with it too" if average.is_file() else "without --ema: go on without it too"
            raise InputError(f"{resume_from_checkpoint} was made {how}, or start anew with --model on it")
        if self.ema is not None:
            self.ema.load_state_dict(load_file(average), strict=True)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sharded and self.args.should_save:
            os.remove(os.path.join(output_dir, "pytorch_model_fsdp.bin"))  # model.safetensors once more


class _Hooks(TrainerCallback):
    def __init__(self, model: MiniClip, train_dataset: CaptionDataset | None):
        self.model, self.train_dataset = model, train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Captions and crops are drawn from (seed, epoch, index): so a run that is resumed in the middle of an epoch
        # sees what it would have seen. (accelerate would set the epoch too, but not for an epoch that is resumed.)
        self.train_dataset.set_epoch(int(state.epoch + 1e-6))

    def on_epoch_end(self, args, state, control, **kwargs):
        # Bad samples are named where they are met; here, and so at the end, those of all processes are counted.
        bad = gather_object([self.train_dataset.bad.sum().item()]) if hasattr(self.train_dataset, "bad") else []
        if any(bad) and args.process_index == 0:
            path = self.train_dataset.bad_samples.path
            where = f" (listed in {path})" if path else ""
            logger.warning("bad samples met so far, each replaced by the next one: %d%s", sum(bad), where)

    def on_step_begin(self, args, state, control, **kwargs):
        # So is patch dropout, which draws from torch's own generator: from (seed, step, process).
        torch.manual_seed(hash((args.seed, state.global_step, args.process_index)))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.model.logit_scale.requires_grad:
            self.model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
