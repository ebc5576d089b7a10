"""Started by test_check_gradients.py: checks the gradients of two processes, some of which are broken on purpose."""

import io
import json
import multiprocessing
import os
import socket
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import TrainerCallback

import miniclip
import miniclip.towers
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.losses import make_loss
from miniclip.training.streaming import Share, StreamDataset
from miniclip.training.trainer import RunTrainer
from miniclip.utils.errors import InputError

RESNET = {"image_size": 32, "hf_model_config": {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
}}  # fmt: skip


def make_trainer(
    folder: Path, loss="clip", patch_dropout=0.0, pairs=6, batch_norm=False, fp16=False, stream=False, **more
) -> RunTrainer:
    """A trainer of a tiny model, with a transformer or a ResNet for images, with `pairs` pairs in a batch."""
    torch.manual_seed(1)  # not the teacher
    config = json.loads((folder / "config.json").read_text())
    config["vision_cfg"] = RESNET if batch_norm else config["vision_cfg"]
    config = MiniClipConfig.from_dict(config)
    model = MiniClip(config)
    if patch_dropout:
        model.visual.patch_dropout = patch_dropout
    args = RunArguments(
        str(folder / "run"), use_cpu=True, per_device_train_batch_size=pairs, max_steps=2, disable_tqdm=True,
        report_to="none", bf16=more.pop("bf16", False), save_strategy="no", **more,
    )  # fmt: skip
    options = SimpleNamespace(loss=loss, duplicates="positive", teacher=[str(folder / "teacher")])
    preprocess, tokenizer = miniclip.Preprocess(config.preprocess_cfg), miniclip.Tokenizer(16)
    if stream:
        dataset = StreamDataset.opened(str(folder / "captions.parquet"), args)(None, preprocess, seed=args.seed)
    else:
        dataset = RunDataset(miniclip.read_captions(folder / "captions.json"), preprocess, seed=args.seed)
    how = {"preprocess": preprocess, "tokenizer": tokenizer, "loss": make_loss(model, options, args)}
    trainer = RunTrainer(model, args, dataset, **how)
    if fp16:  # accelerate allows it on GPUs only; torch's scaler and autocast work here too
        accelerator, args.fp16 = trainer.accelerator, True
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu")  # of 65536, at which the tiny model's first step overflows
    return trainer


def write_stream(folder: Path):
    """The caption file as a table to stream."""
    import datasets

    records = json.loads((folder / "captions.json").read_text())
    columns = {"image": [str(folder / r["image"]) for r in records], "caption": [r["caption"] for r in records]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(folder / "captions.parquet")


def check(trainer: RunTrainer) -> tuple[str, str]:
    """What a check prints, and its error."""
    with redirect_stdout(io.StringIO()) as out:
        try:
            trainer.check_gradients()
        except InputError as error:
            return out.getvalue(), str(error)
    return out.getvalue(), ""


def gather_without_gradients(embeds):
    rows = [torch.empty_like(embeds) for _ in range(dist.get_world_size())] if dist.is_initialized() else [embeds]
    if dist.is_initialized():
        dist.all_gather(rows, embeds.detach().contiguous())
        rows[dist.get_rank()] = embeds
    return torch.cat(rows)


class Hook(TrainerCallback):
    """Replaces the averaging of gradients by DistributedDataParallel: their sum, or nothing."""

    def __init__(self, trainer, sums: bool):
        self.trainer, self.sums = trainer, sums

    def on_step_begin(self, args, state, control, **kwargs):
        def exchange(_, bucket):
            done = torch.futures.Future()
            if self.sums:
                dist.all_reduce(bucket.buffer())
            done.set_result(bucket.buffer())
            return done

        self.trainer.model_wrapped.register_comm_hook(None, exchange)


def all_pairs_for_each(self, loader, *args, **kwargs):
    """In place of accelerate's division of the batches among the processes."""
    return loader


def first_share(dataset, rank, ranks, batch_size):
    return Share(dataset, 0, ranks, batch_size)


CASES = {  # options, what is replaced, whether the averaging is
    "all": ({"loss": "siglip", "grad_cache_chunk_size": 2, "gradient_accumulation_steps": 2, "bf16": True}, {}, None),
    "dropout": ({"loss": "distill", "patch_dropout": 0.5, "grad_cache_chunk_size": 4}, {}, None),
    "gather": ({"grad_cache_chunk_size": 2}, {"miniclip.loss.gather": gather_without_gradients}, None),
    "own": ({}, {"miniclip.loss.gather": lambda x: x, "miniclip.loss.process_index": lambda: 0}, None),
    "sum": ({}, {}, True),
    "apart": ({}, {}, False),
    "same": ({}, {"accelerate.Accelerator.prepare_data_loader": all_pairs_for_each}, None),
    "same stream": ({"stream": True}, {"miniclip.training.streaming.Share": first_share}, None),
    "stream": ({"stream": True, "gradient_accumulation_steps": 2}, {}, None),
    "norm": ({"batch_norm": True}, {}, None),
}


def work(folder: Path, name: str, rank: int, port: int):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    options, replaced, sums = CASES[name]
    patches = [patch(target, new) for target, new in replaced.items()]
    for each in patches:
        each.start()
    trainer = make_trainer(folder, **options)
    if sums is not None:
        trainer.add_callback(Hook(trainer, sums))
    found = check(trainer)
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(found))


def main(folder: Path, names: list[str]):
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")  # each case begins with all imports done
    for name in names:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [fork.Process(target=work, args=(folder, name, rank, port)) for rank in (0, 1)]
        for process in started:
            process.start()
        for process in started:
            process.join()
            assert process.exitcode == 0, name


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
