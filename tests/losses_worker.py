"""Started from test_losses.py: the gradients of one step under DDP, for each loss, to a file."""

import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.training.distill import Distillation
from miniclip.training.grad_cache import wrap_towers
from miniclip.training.losses import make_loss
from miniclip.transforms import Preprocess
from miniclip.utils.command_line import run


class Normalized(Preprocess):
    """Takes images that are normalised already."""

    def normalize(self, levels):
        return levels


def main(batch_file: str, output: str):
    rank, n = 0, 1
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank, n = dist.get_rank(), dist.get_world_size()
    saved = torch.load(batch_file, weights_only=True)
    teacher = MiniClip(MiniClipConfig.from_dict(saved["teacher_config"]))
    teacher.load_state_dict(saved["teacher"])
    rows = len(saved["batch"]["input_ids"])
    batch = {name: t[rank * rows // n : (rank + 1) * rows // n] for name, t in saved["batch"].items()}
    ids = batch.pop("pair_ids")
    results = []
    for case in saved["cases"]:
        model = MiniClip(MiniClipConfig.from_dict(saved["config"]))
        model.load_state_dict(saved["weights"])
        model.logit_bias.requires_grad_(case["loss"] == "siglip")
        if case["loss"] in ("clip", "siglip", "superclip"):
            options = SimpleNamespace(loss=case["loss"], duplicates=case["duplicates"])
            objective = make_loss(model, options, SimpleNamespace(fsdp=None))
        else:
            preprocess = Normalized(teacher.config.preprocess_cfg)
            options = SimpleNamespace(loss="clip", duplicates=case["duplicates"])
            contrast = make_loss(model, options, None) if case["loss"] == "distill" else None
            objective = Distillation(teacher, preprocess, model, contrast)
        wrap_towers(model, None, case["chunk_size"], fast=False)
        ddp = DistributedDataParallel(model) if n > 1 else model
        loss = objective(ddp(**batch), batch | {"pair_ids": ids})
        loss.backward()
        losses = [loss.detach()]
        if n > 1:
            losses = [torch.zeros_like(loss) for _ in range(n)]
            dist.all_gather(losses, loss.detach())
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": torch.stack(losses).mean(), "grads": grads})
    if rank == 0:
        torch.save(results, output)
    if n > 1:
        dist.barrier()


if __name__ == "__main__":
    run(lambda argv: main(*argv))
