"""FSDP 2 (fully sharded data parallel: Zhao et al., arXiv 2304.11277), through accelerate.

Each process keeps a shard of every weight, gradient and optimizer state; a block's are gathered while it runs."""

import os
from contextlib import AbstractContextManager

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from miniclip.model import ClipOutput, MiniClip
from miniclip.utils.errors import InputError

SCALARS = ("logit_scale", "logit_bias")


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether FSDP is requested, by `--fsdp` or `accelerate launch`. Raises InputError for what is not supported."""
    if not args.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = args.fsdp_config.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", "1")
    if int(version) != 2:
        raise InputError('FSDP 1 is deprecated: use FSDP 2, with fsdp_config {"version": 2} or --fsdp_version 2')
    if args.fp16:
        raise InputError("FSDP with fp16 is not supported: use --bf16")
    if args.world_size == 1:
        raise InputError("FSDP shards a model across processes, but there is only one: use torchrun")
    return True


def prepare_fsdp(trainer: Trainer):
    """Prepares a trainer and its MiniClip, before training, for accelerate's FSDP."""
    args, state, model = trainer.args, trainer.accelerator.state, trainer.model
    if args.device.type == "cpu":  # accelerate silently skips FSDP there; torch supports it
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
        trainer.is_fsdp_enabled = True
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # where every new state looks it up
    plugin = state.fsdp_plugin
    # Checkpoints hold whole weights, as without FSDP: any number of processes can resume from them.
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    plugin.cpu_ram_efficient_loading = False  # for transformers' models; ours are read by every process
    # In bf16 the shards stay fp32 and each product rounds its inputs, as elsewhere. FSDP's own mixed precision would
    # also round the logit scale, in steps of 1.6%, and the embeddings that the loss compares.
    plugin.mixed_precision_policy = None
    blocks = [*model.visual.blocks, *model.text.blocks]  # the units that are gathered, unless fsdp_config names others
    model._no_split_modules = sorted({type(block).__name__ for block in blocks})
    for name in SCALARS:  # scalars cannot be sharded
        if (scalar := getattr(model, name)) is not None:
            setattr(model, name, nn.Parameter(scalar.detach().reshape(1), scalar.requires_grad))


def autocast(args: TrainingArguments) -> AbstractContextManager:
    """What the forward pass of a sharded model runs in. A cache would keep rounded copies of all gathered weights."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False)


def scalar_outputs(outputs: ClipOutput) -> ClipOutput:
    """The outputs of a sharded model with scale and bias as scalars again: sums of one number, and no views."""
    bias = outputs.logit_bias
    return outputs._replace(logit_scale=outputs.logit_scale.sum(), logit_bias=None if bias is None else bias.sum())


def with_scalars(weights: dict[str, Tensor], shape: tuple) -> dict[str, Tensor]:
    """The same weights with the logits' scale and bias in this shape: (), or (1,) for FSDP."""
    return weights | {name: weights[name].reshape(shape) for name in SCALARS if name in weights}


def whole_model(model: MiniClip, device: torch.device) -> MiniClip:
    """A whole copy of a sharded model on each process, to evaluate. All processes must call it together."""
    weights = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    for name, _ in model.named_buffers():  # BatchNorm's statistics, which differ by process: take the first one's
        if name in weights:
            torch.distributed.broadcast(weights[name], src=0)
    with torch.device("meta"):
        whole = MiniClip(model.config)
    whole.load_state_dict(with_scalars(weights, ()), assign=True)
    return whole.to(device).eval()


def load_whole_weights(model: MiniClip, weights: dict[str, Tensor]):
    """Loads whole weights, which each process passes, into a sharded model, strictly."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # slow to import

    set_model_state_dict(model, with_scalars(weights, (1,)), options=StateDictOptions(full_state_dict=True))
