"""Started by torchrun from test_losses.py: the gradients of one step under DDP, for each loss, to a file."""

import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.training.distill import Distillation
from miniclip.training.grad_cache import batch_forward
from miniclip.training.objectives import make_objective
from miniclip.transforms import Preprocess


class Normalized(Preprocess):
    """Takes images that are normalised already."""

    def normalize(self, levels):
        return levels


def main(batch_file: str, output: str):
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
        if case["loss"] in ("clip", "siglip"):
            objective = make_objective(case["loss"], case["duplicates"], model)
        else:
            preprocess = Normalized(teacher.config.preprocess_cfg)
            objective = Distillation(teacher, preprocess, model, case["loss"] == "distill", case["duplicates"])
        model.forward = partial(batch_forward, model, None, case["chunk_size"])
        ddp = DistributedDataParallel(model)
        loss = objective(ddp(**batch), ids, batch)
        loss.backward()
        losses = [torch.zeros_like(loss) for _ in range(n)]
        dist.all_gather(losses, loss.detach())
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": torch.stack(losses).mean(), "grads": grads})
    if rank == 0:
        torch.save(results, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
