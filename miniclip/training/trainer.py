"""The trainer of a real run: the core's ClipTrainer, guarded, fast, with GradCache, FSDP, rates by layer and EMA."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from miniclip.inference.evaluator import Evaluator
from miniclip.inference.matmul import fast_arithmetic
from miniclip.model import MiniClip
from miniclip.run.guard import GuardedTrainer
from miniclip.trainer import ClipTrainer
from miniclip.training import adamw, fsdp
from miniclip.training.arguments import RunArguments
from miniclip.training.check_gradients import check_gradients
from miniclip.training.convolutions import convolution_wrappers
from miniclip.training.dataset import RunDataset
from miniclip.training.freeze import FrozenDataset
from miniclip.training.grad_cache import OneBatch, wrap_towers
from miniclip.training.holdout import fit_batch
from miniclip.utils.errors import InputError
from miniclip.utils.machine import keep_freed_memory, return_freed_memory

logger = logging.getLogger(__name__)


class RunTrainer(GuardedTrainer, ClipTrainer):
    """The trainer of train.py: a ClipTrainer that survives interruptions (`run/guard.py`) and is faster.

    `preprocess` normalises the images of a RunDataset, `lr_scale` gives the factor of the learning rate of a parameter
    by its name, and `ema`, which a callback updates, is evaluated in place of the model and saved in checkpoints."""

    def __init__(
        self, model: MiniClip, args: RunArguments, train_dataset: RunDataset | None = None, *, preprocess,
        evaluator: Evaluator | None = None, lr_scale: Callable | None = None, ema: MiniClip | None = None, **kwargs,
    ):  # fmt: skip
        self.sharded = fsdp.uses_fsdp(args)
        self.lean = args.grad_cache_chunk_size and args.device.type == "cpu"  # a large batch, in little memory
        # FSDP needs every block to be called as a module, which the fast path does not do.
        wrap_towers(model, preprocess.normalize, args.grad_cache_chunk_size, args.fast and not self.sharded)
        if args.fast and not (self.sharded or args.activation_checkpointing or args.torch_compile):
            model.visual.wrappers = (*convolution_wrappers(model.visual, preprocess.cfg.size), *model.visual.wrappers)
        if model.visual.may_skip_parameters or model.text.may_skip_parameters:
            args.ddp_find_unused_parameters = True
        if args.torch_compile:  # a graph in chunks cannot fill the cache of moments
            preprocess.normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=args.device))
        learning = any(isinstance(m, _BatchNorm) and m.training for m in model.train().modules())
        args.chunks_help &= not learning
        if args.grad_cache_chunk_size and learning:
            wrong = "grad_cache_chunk_size: a BatchNorm would compute its statistics from a chunk, not the batch"
            raise InputError(f"{wrong}. Remove it or freeze the image tower (--freeze_image tower or all_but_N)")
        self.lr_scale, self.ema, self.measured_by, self.normalize = lr_scale, ema, evaluator, preprocess.normalize
        if evaluator:
            check_metric(args, evaluator)
        if (steps := args.gradient_accumulation_steps) > 1 and args.process_index == 0:
            n = args.per_device_train_batch_size
            chunks = f", and takes as little memory with --grad_cache_chunk_size {args.grad_cache_chunk_size or n}"
            better = f"--per_device_train_batch_size {n * steps} does{chunks * args.chunks_help}"
            logger.warning(f"gradient accumulation averages losses of {n} pairs and adds no negatives. {better}")
        super().__init__(model, args, train_dataset, evaluator=evaluator and self.measure, **kwargs)
        self.add_callback(ReportBadSamples(train_dataset))
        if self.sharded:
            fsdp.prepare_fsdp(self)
        if has_length(train_dataset):  # a stream may have none
            sampler = train_dataset.sampler(args)
            fit_batch(args, len(train_dataset if sampler is None else sampler), given=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As ClipTrainer's; the precomputed features of a frozen tower replace its inputs."""
        images = inputs.get("image_features", inputs.get("pixel_values"))
        with fsdp.autocast(self.args) if self.sharded else nullcontext():
            outputs = model(images, inputs.get("text_features", inputs.get("input_ids")))
        outputs = fsdp.scalar_outputs(outputs) if self.sharded else outputs
        loss = self.loss(outputs, inputs)
        self.guard.batches.append((loss.detach(), inputs.get("row"), inputs.get("input_ids")))
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        sampler = self.train_dataset.sampler(self.args)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def get_train_dataloader(self):
        own = self.train_dataset.dataloader(self.args, self.data_collator)
        loader = super().get_train_dataloader() if own is None else own
        few = own is None and self.lean and self.args.world_size == 1 and not self.args.dataloader_num_workers
        return OneBatch(loader) if few else loader

    def training_step(self, *args, **kwargs):
        if self.lean:  # the images of the batch were in memory twice until it was put together
            return_freed_memory()
        return super().training_step(*args, **kwargs)

    get_optimizer_cls_and_kwargs = staticmethod(adamw.optimizer)

    def create_optimizer(self, model=None):
        """Trainer's, with its groups split by learning rate. The highest, which is logged, comes first."""
        made = self.optimizer is not None
        super().create_optimizer(model)
        if self.lr_scale and not made:
            names = {p: name for name, p in (model or self.model).named_parameters()}
            groups = {}
            for number, group in enumerate(self.optimizer.param_groups):
                for p in group["params"]:
                    scale = self.lr_scale(names[p])
                    same = {**group, "params": [], "lr": scale * group["lr"]}
                    groups.setdefault((-scale, number), same)["params"].append(p)
            self.optimizer.param_groups = [groups[key] for key in sorted(groups)]
        return self.optimizer

    def _init_training_state(self, max_steps, *args):
        """Trainer's, in which a resumed run would log, evaluate and save as often as the run before."""
        if self.args.logs_by_length:
            self.args.logging_steps = min(10, max(1, max_steps // 20))
        place = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return place

    def measure(self, model: MiniClip) -> dict[str, float]:
        """The evaluator that ClipTrainer calls: on the average of the weights, or on a sharded model made whole."""
        model = self.ema or model
        return self.measured_by(fsdp.whole_model(model, self.args.device) if self.sharded else model)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As GuardedTrainer's, with fast arithmetic."""
        if self.args.fast and self.args.device.type == "cpu" and not self.args.grad_cache_chunk_size:
            keep_freed_memory()
        with fast_arithmetic(self.args.device) if self.args.fast else nullcontext():
            return super().train(resume_from_checkpoint, **kwargs)

    check_gradients = check_gradients  # as a method

    def _save(self, output_dir=None, state_dict=None):
        # The weights that FSDP gathers have a scale of shape (1,).
        super()._save(output_dir, fsdp.with_scalars(state_dict, ()) if state_dict else None)
        if self.ema and self.is_in_train and self.args.should_save:
            path = Path(output_dir or self.args.output_dir) / "ema.safetensors"
            save_file(self.ema.state_dict(), path, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        if self.sharded:
            return fsdp.load_whole_weights(self.model, load_file(folder / "model.safetensors"))
        if isinstance(self.train_dataset, FrozenDataset):
            check_features(self.train_dataset, self.model, load_file(folder / "model.safetensors"), folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        average = folder / "ema.safetensors"
        if average.is_file() != (self.ema is not None):
            how = "with --ema. Resume with it" if average.is_file() else "without --ema. Resume without it"
            raise InputError(f"{resume_from_checkpoint} was saved {how}, or start a new run with --model on it")
        if self.ema:
            self.ema.load_state_dict(load_file(average))

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sharded and self.args.should_save:
            Path(output_dir, "pytorch_model_fsdp.bin").unlink()  # a copy of model.safetensors


def check_features(dataset: FrozenDataset, model: MiniClip, weights: dict, checkpoint):
    """Raises InputError if the precomputed features are those of other weights than a checkpoint has."""
    kinds = {"visual.": dataset.image_features, "text.": dataset.text_features}
    for name, p in model.named_parameters():
        computed = any(name.startswith(kind) and features is not None for kind, features in kinds.items())
        if computed and not p.requires_grad and not torch.equal(p.cpu(), weights.get(name, p.cpu())):
            fix = "Name the weights that its run began with: --model, --pretrained"
            wrong = f"other weights in its frozen towers than those that the features are from ({name})"
            raise InputError(f"{checkpoint} has {wrong}. {fix}")


def check_metric(args: RunArguments, evaluator: Evaluator):
    """Makes the evaluator's own metric the default. Raises InputError for one that it does not have."""
    if args.metric_for_best_model == "mean_recall":
        args.metric_for_best_model = evaluator.primary_metric
    name = (args.metric_for_best_model or evaluator.primary_metric).removeprefix("eval_")
    if (known := evaluator.metric_names()) and name not in known:
        raise InputError(f"metric_for_best_model {name!r} is not one of {', '.join(sorted(known))}")


class ReportBadSamples(TrainerCallback):
    """Reports the number of bad samples on all processes after each epoch; each is logged when it is read."""

    def __init__(self, dataset: RunDataset | None):
        self.dataset = dataset

    def on_epoch_end(self, args, state, control, **kwargs):
        bad = sum(gather_object([self.dataset.bad.sum().item()]))
        if bad and args.process_index == 0:
            where = f" (listed in {path})" if (path := self.dataset.bad_samples.path) else ""
            logger.warning("bad samples so far, each replaced by the next sample: %d%s", bad, where)
