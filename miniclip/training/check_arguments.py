"""Which training arguments of transformers work here: one that would do nothing, or fail later, is refused by name."""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig

from miniclip.retrieval import retrieval_metrics
from miniclip.training.adamw import optimizer
from miniclip.training.fsdp import uses_fsdp
from miniclip.utils.errors import InputError

_EVALUATION = "evaluation embeds the whole set and searches it, instead of predicting batch by batch. Remove it"
_UPLOAD = "it publishes paths. Afterwards: python -m miniclip push --model OUTPUT_DIR --repo ORG/NAME --license LICENCE"
_TOKENS = "the loss is an average over pairs, not tokens. Remove it"
_TRANSFORMERS = "it rewrites models of transformers, and MiniCLIP's is not one. Remove it"
# Arguments of which no value but the default is accepted, and why.
REFUSED = {
    "label_smoothing_factor": "it smooths class labels, and contrastive losses have none. Remove it",
    "neftune_noise_alpha": "it is for language models. Remove it; --patch_dropout regularises the image tower",
    "remove_unused_columns": "it would remove what finds duplicates and names bad samples. Remove it",
    "label_names": "there are no labels. Remove it",
    "length_column_name": "it is for --train_sampling_strategy group_by_length, which is not supported. Remove it",
    "optim_target_modules": "it is for the optimizers of GaLore and APOLLO, which are not supported. Remove it",
    "include_num_input_tokens_seen": _TOKENS, "average_tokens_across_devices": _TOKENS,
    "use_liger_kernel": _TRANSFORMERS, "liger_kernel_config": _TRANSFORMERS,
    "use_cache": "it is for generating text. Remove it",
    "auto_find_batch_size": "a smaller batch has fewer negatives. Remove it: if memory runs out, an error names the"
                            " largest batch that fits, and --grad_cache_chunk_size keeps the batch",
    "prediction_loss_only": _EVALUATION, "eval_do_concat_batches": _EVALUATION, "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION, "include_for_metrics": _EVALUATION, "batch_eval_metrics": _EVALUATION,
    "bf16_full_eval": "evaluation has the precision of training. Use --bf16, or evaluate.py --precision bf16",
    "fp16_full_eval": "evaluation has the precision of training. Use evaluate.py --precision bf16",
    "do_predict": "train.py predicts nothing. Use evaluate.py --save_features",
    "logging_nan_inf_filter": "it would log NaN as 0, but a NaN loss ends the run. Remove it",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint without it. Remove it",
    "restore_callback_states_from_checkpoint": "a resumed run restores what it needs without it. Remove it",
    "save_on_each_node": "all nodes read and write one output_dir, on a shared disk. Remove it",
    "debug": "a NaN or infinite loss is always reported, with its batch and its gradients. Remove it",
    "dataloader_in_order": "a resumed run would repeat some pairs and miss others. Remove it",
    "push_to_hub": _UPLOAD, "hub_token": _UPLOAD, "hub_private_repo": _UPLOAD, "hub_model_id": _UPLOAD,
    "hub_strategy": _UPLOAD, "hub_always_push": _UPLOAD, "hub_revision": _UPLOAD,
    "deepspeed": "models too large for one GPU are sharded by FSDP (docs/distributed.md). Remove it",
    "parallelism_config": "only data parallelism and FSDP are supported (docs/distributed.md). Remove it",
}  # fmt: skip
_POSITIVE = "above 0", lambda x: 0 < x < math.inf
_NOT_NEGATIVE = "0 or more", lambda x: 0 <= x < math.inf
_COUNT = "1 or more", lambda x: x >= 1
_BETA = "at least 0 and below 1", lambda x: 0 <= x < 1
_SEED = "from 0 to 4294967295", lambda x: 0 <= x < 2**32
# The values that are allowed, as words and as a test. None always is.
RANGES: dict[str, tuple[str, Callable]] = {
    "do_train": ("true: train.py trains, and evaluate.py measures", bool),
    "learning_rate": _NOT_NEGATIVE, "weight_decay": _NOT_NEGATIVE, "warmup_steps": _NOT_NEGATIVE,
    "adam_beta1": _BETA, "adam_beta2": _BETA, "adam_epsilon": _NOT_NEGATIVE, "max_grad_norm": _NOT_NEGATIVE,
    "num_train_epochs": _POSITIVE, "max_steps": ("1 or more, or -1 for num_train_epochs", lambda x: x == -1 or x >= 1),
    "per_device_train_batch_size": _COUNT, "per_device_eval_batch_size": _COUNT, "gradient_accumulation_steps": _COUNT,
    "logging_steps": _POSITIVE, "eval_steps": _POSITIVE, "save_steps": _POSITIVE, "eval_delay": _NOT_NEGATIVE,
    "torch_empty_cache_steps": _COUNT, "dataloader_num_workers": _NOT_NEGATIVE, "dataloader_prefetch_factor": _COUNT,
    "seed": _SEED, "data_seed": _SEED, "ddp_timeout": _POSITIVE, "ddp_bucket_cap_mb": _POSITIVE,
    "ddp_backend": ("one of " + ", ".join(torch.distributed.Backend.backend_list),
                    torch.distributed.Backend.backend_list.__contains__),
    "train_sampling_strategy": ("random or sequential: grouping by length would choose the negatives",
                                ("random", "sequential").__contains__),
    "dataloader_multiprocessing_context": ("one of " + ", ".join(multiprocessing.get_all_start_methods()),
                                           multiprocessing.get_all_start_methods().__contains__),
    "torch_compile_mode": ("one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs",
                           ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs").__contains__),
    "grad_cache_chunk_size": _NOT_NEGATIVE,
}  # fmt: skip
# Arguments that do nothing without another one, by name.
OF_WORKERS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
NEEDS = {"fsdp_config": "fsdp"} | dict.fromkeys(OF_WORKERS, "dataloader_num_workers")
LAUNCHED = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}  # one of several processes
CHECKPOINTING = {"every_n_layers", "offload", "use_reentrant", "preserve_rng_state"}
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
NO_KWARGS = ("constant", "constant_with_warmup")
MEASURED = ("reduce_lr_on_plateau", "greedy")  # schedules that follow a metric
# What each optimizer of torch and transformers reads from --optim_args.
OPTIM_ARGS = {
    "adamw_torch": ("states",), "adamw_torch_fused": ("states",), "adafactor": (),
    "sgd": ("momentum", "dampening", "nesterov"), "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}  # fmt: skip
NO_ADAM = ("adafactor", "sgd", "adagrad", "rmsprop", "lion", "paged_lion")  # how the names of those begin
REFUSED_OPTIMIZERS = {  # by how their names begin
    **dict.fromkeys(("galore", "apollo"), "it replaces the groups of parameters that are and are not decayed"),
    **dict.fromkeys(("lomo", "adalomo"), "it changes the weights in the backward pass, before a NaN can be found"),
    "schedule_free": "checkpoints and evaluation would have other weights than its average",
}


def check_before(args: TrainingArguments):
    """Raises InputError for an argument of RunArguments that cannot work, before transformers prepares for it."""
    for f in fields(args):
        value = getattr(args, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        false = False if default == "no" else default  # as the parser of transformers reads it
        if f.name in REFUSED and value not in (None, default, false, [], ""):
            raise InputError(f"{f.name} is not supported: {REFUSED[f.name]}")
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise InputError(f"{f.name} {value} is not JSON: {error}") from None
        allowed, test = RANGES.get(f.name, (None, None))
        if test and value is not None and not (isinstance(value, (str, int, float)) and test(value)):
            raise InputError(f"{f.name} is {value}. It must be {allowed}")
        if (other := NEEDS.get(f.name)) and value and not getattr(args, other):
            raise InputError(f"{f.name} has no effect without {other}. Add --{other} or remove it")
    if args.ddp_backend and not LAUNCHED & os.environ.keys():
        raise InputError("ddp_backend needs several processes. Use torchrun, or remove it")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(f"deepspeed is not supported: {REFUSED['deepspeed']}")


def check_after(args: TrainingArguments):
    """The same for what transformers has filled in."""
    if args.fp16 and args.device.type == "cpu":
        raise InputError("fp16 needs a GPU. Use --bf16 true, which works on a CPU too")
    uses_fsdp(args)
    config, usual = args.accelerator_config.to_dict(), AcceleratorConfig().to_dict()
    for name, value in config.items():
        if name not in ("non_blocking", "gradient_accumulation_kwargs") and value != usual.get(name):
            wrong = "it would change which pairs a step has. Remove it"
            raise InputError(f"accelerator_config: {name} {value} is not supported: {wrong}")
    if unknown := (config["gradient_accumulation_kwargs"] or {}).keys() - {"sync_each_batch"}:
        fix = "Use --gradient_accumulation_steps"
        raise InputError(f"accelerator_config: {', '.join(sorted(unknown))} is not supported. {fix}")
    if kwargs := args.activation_checkpointing_kwargs:
        if not args.activation_checkpointing:
            raise InputError("activation_checkpointing_kwargs have no effect. Add --activation_checkpointing")
        if unknown := kwargs.keys() - CHECKPOINTING or kwargs.get("offload") or kwargs.get("use_reentrant"):
            wrong = "offload and use_reentrant" if unknown is True else ", ".join(sorted(unknown))
            raise InputError(f"activation_checkpointing_kwargs: {wrong} not supported. Use every_n_layers")
    if args.torch_compile:
        known = {backend.value.lower() for backend in DynamoBackend} & {*torch.compiler.list_backends(exclude_tags=())}
        if (backend := args.torch_compile_backend) not in known:
            raise InputError(f"torch_compile_backend {backend!r} is not one of {', '.join(sorted(known))}")
    check_optimizer(args)
    check_schedule(args)


def check_optimizer(args: TrainingArguments):
    """Raises InputError for an optimizer whose package is missing, or one that cannot work here."""
    name = str(args.optim.value)
    for start, why in REFUSED_OPTIMIZERS.items():
        if name.startswith(start):
            raise InputError(f"optim {name} is not supported: {why}. Use adamw_torch")
    try:
        given = dict(pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair)
    except ValueError:
        raise InputError(f"optim_args {args.optim_args!r} is not name=value,name=value") from None
    if unknown := given.keys() - set(OPTIM_ARGS.get(name, given)):
        known = ", ".join(OPTIM_ARGS[name]) or "nothing: see --adam_beta1, --weight_decay and the like"
        useless = f"{', '.join(sorted(unknown))} has no effect"
        raise InputError(f"optim_args: {useless} with optim {name}, which reads {known}")
    try:
        kind, keywords = optimizer(args)
        kind([torch.nn.Parameter(torch.zeros(1))], **keywords)  # a wrong value
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"optim {name} cannot be used: {_line(error)}") from error


def check_schedule(args: TrainingArguments):
    """Raises InputError for a schedule without what it needs, by trying it on an optimizer of one number."""
    name = str(args.lr_scheduler_type.value)
    kwargs = args.lr_scheduler_kwargs or {}
    if not isinstance(kwargs, dict):
        raise InputError(f"lr_scheduler_kwargs {kwargs!r} is not a JSON object. Write, for example, '{{\"power\": 2}}'")
    if kwargs and name in NO_KWARGS:
        raise InputError(f"lr_scheduler_kwargs has no effect with lr_scheduler_type {name}. Remove it")
    if name in MEASURED:
        mode = "max" if args.greater_is_better else "min"  # transformers leaves it at min, whatever the metric
        if kwargs.get("mode", mode) != mode:
            raise InputError(f"lr_scheduler_kwargs: mode {kwargs['mode']} contradicts greater_is_better. Remove mode")
        kwargs = args.lr_scheduler_kwargs = kwargs | {"mode": mode}
        if name == "greedy" and not {"min_lr", "max_lr"} <= kwargs.keys():
            fix = 'as in --lr_scheduler_kwargs \'{"min_lr": 1e-6, "max_lr": 1e-4}\''
            raise InputError(f"lr_scheduler_type greedy needs the limits of the learning rate, {fix}")
    steps = max(args.max_steps, 1000)
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        schedule = get_scheduler(name, optimizer, args.get_warmup_steps(steps), steps, kwargs)
        for function in [] if name in MEASURED else schedule.lr_lambdas:
            function(steps // 2), function(steps)
    except (TypeError, ValueError, ArithmeticError) as error:
        fix = "Give it as --lr_scheduler_kwargs '{\"name\": value}'"
        raise InputError(f"lr_scheduler_type {name} cannot be used: {_line(error)}. {fix}") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(". ").replace("`", "")


def check_given(options, args: TrainingArguments, given: dict, named: Collection[str]):
    """Raises InputError for an argument without effect beside the others. `given` are those that the user set, `named`
    those of them on the command line: one in a recipe that these make useless is passed over."""
    for name, others, why in without_effect(options, args):
        if name in given and (name in named or not set(others) & set(named)):
            raise InputError(f"{name} has no effect {why}. Remove it")
    if args.per_device_train_batch_size * args.world_size == 1 and not options.loss.startswith("coca"):
        raise InputError("per_device_train_batch_size is 1: a pair alone has no negatives to learn from. Use 2 or more")
    if not (options.eval_file or options.eval_classes or options.holdout != 0 and not options.streaming):
        for name, wanted in (
            ("eval_strategy", args.eval_strategy != "no"), ("save_strategy best", args.save_strategy == "best"),
            ("load_best_model_at_end", args.load_best_model_at_end), ("eval_on_start", args.eval_on_start),
            ("do_eval", args.do_eval),
            (f"lr_scheduler_type {args.lr_scheduler_type.value}", args.lr_scheduler_type in MEASURED),
        ):  # fmt: skip
            if wanted:
                raise InputError(f"{name} needs something to measure. Add --eval_file")
    elif given.get("do_eval", True) is False:
        fix = "eval_file is measured at the end. Remove one of them"
        fix = fix if options.eval_file else "a held-out part is measured at the end. Replace it by --holdout 0"
        raise InputError(f"do_eval is false, but {fix}")
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    one = np.eye(1, dtype=np.float32)  # an embedding, for the names of the metrics
    known = retrieval_metrics(one, one, [0], (1, 3, 5, 10))
    if metric and not metric.startswith("zero_shot_") and metric not in known:
        raise InputError(f"metric_for_best_model {metric!r} is not one of {', '.join(sorted(known))}")
    if {"resume", "resume_from_checkpoint"} <= set(named):
        raise InputError("resume and resume_from_checkpoint contradict each other. Remove one of them")
    if args.resume_from_checkpoint and options.overwrite_output_dir:
        raise InputError("resume continues the run that overwrite_output_dir deletes. Remove one of them")


def without_effect(options, args: TrainingArguments):
    """Yields arguments that do nothing beside the others: name, the arguments that make it so, and the reason."""
    for kind in ("logging", "eval", "save"):
        strategy = f"{kind}_strategy"
        if (value := getattr(args, strategy).value) != "steps":
            yield f"{kind}_steps", (strategy,), f"with {strategy} {value}"
    if options.frozen[0] and options.crop_scale < 1:
        yield "crop_scale", ("freeze_image", "model"), "on a frozen image tower, which sees each image once, as it is"
    useless = {"grad_cache_chunk_size": args.grad_cache_chunk_size, "layer_decay": options.layer_decay < 1}
    useless |= dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), args.activation_checkpointing)
    for name in (name for name, wanted in useless.items() if wanted and all(options.frozen)):
        yield name, ("freeze_image", "freeze_text", "model"), "between frozen towers, of which only projections learn"
    if args.eval_strategy == "no":
        yield "eval_delay", ("eval_strategy",), "without evaluation during training"
    if (schedule := args.lr_scheduler_type.value) in NO_WARMUP and args.warmup_steps:
        yield "warmup_steps", ("lr_scheduler_type",), f"with lr_scheduler_type {schedule}"
    if (optim := args.optim.value).startswith(NO_ADAM):
        for name in ("adam_epsilon",) if "lion" in optim else ("adam_beta1", "adam_beta2", "adam_epsilon"):
            yield name, ("optim",), f"with optim {optim}"
    if "trackio" not in args.report_to:
        for name in ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
            yield name, ("report_to",), "without --report_to trackio"
    if options.streaming or options.train_num_samples or "::" in (options.train_file or ""):
        for name in ("data_seed", "train_sampling_strategy"):
            yield name, (), "on the order of a stream or a mixture of sources, which follows seed"
