"""Started, in several processes, from test_training.py: the gradients of one step under DDP, to a file."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from miniclip.config import MiniClipConfig
from miniclip.loss import clip_loss
from miniclip.model import MiniClip
from miniclip.training.grad_cache import wrap_towers
from miniclip.utils.command_line import run


def main(batch_file: str, output: str):
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    saved = torch.load(batch_file, weights_only=True)
    model = MiniClip(MiniClipConfig.from_dict(saved["config"]))
    model.load_state_dict(saved["weights"])
    wrap_towers(model, None, saved["chunk_size"], fast=False)
    ddp = DistributedDataParallel(model)
    rows = slice(rank * len(saved["input_ids"]) // n, (rank + 1) * len(saved["input_ids"]) // n)
    loss = clip_loss(*ddp(pixel_values=saved["pixel_values"][rows], input_ids=saved["input_ids"][rows])[:3])
    loss.backward()
    losses = [torch.zeros_like(loss) for _ in range(n)]
    dist.all_gather(losses, loss.detach())
    if rank == 0:
        grads = {name: p.grad for name, p in model.named_parameters()}
        torch.save({"loss": torch.stack(losses).mean(), "grads": grads}, output)
    dist.barrier()


if __name__ == "__main__":
    run(lambda argv: main(*argv))
