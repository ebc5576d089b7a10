"""Started by torchrun from test_scale.py: what several processes make, to files of the first of them."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import miniclip
from miniclip.loss import clip_loss
from miniclip.trainer import ClipTrainer, ClipTrainingArguments


def make_trainer(folder: Path, output: str, per_device: int, model=None, **more) -> ClipTrainer:
    """A trainer of a small model (`model_dir`, unless a model is given) for four steps of 12 pairs."""
    args = ClipTrainingArguments(
        str(folder / output), use_cpu=True, bf16=more.pop("bf16", False), per_device_train_batch_size=per_device,
        max_steps=4, learning_rate=1e-2, adam_epsilon=1e-3, save_steps=2, disable_tqdm=True, logging_steps=1, **more,
    )  # fmt: skip
    model = model or miniclip.load(folder / "model_dir")[0]
    records = miniclip.read_captions(folder / "captions.json")
    preprocess, tokenizer = miniclip.Preprocess(model.config.preprocess_cfg), miniclip.Tokenizer(16)
    dataset = miniclip.CaptionDataset(records, preprocess, seed=args.seed)
    eval_records = miniclip.read_captions(folder / "odd.json")
    return ClipTrainer(model, args, dataset, eval_records, preprocess=preprocess, tokenizer=tokenizer)


def bytes_kept_by_the_loss(batch: int) -> int:
    """What the loss of `batch` pairs on each process keeps for its backward pass."""
    sizes = {}
    embeds = torch.nn.functional.normalize(torch.randn(2, batch, 8), dim=-1).requires_grad_()

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        clip_loss(embeds[0], embeds[1], torch.tensor(10.0)).backward()
    return sum(sizes.values())


def main(folder: Path):
    found = {}
    trainer = make_trainer(folder, "ddp", 4, eval_strategy="no")
    n, first = trainer.args.world_size, trainer.args.process_index == 0
    found["metrics"] = trainer.evaluate()
    two = trainer.eval_dataset[:2]  # fewer than there are processes
    found["metrics_of_two"] = trainer.evaluate(two)
    found["kept"] = bytes_kept_by_the_loss(1200 // n)

    found["sharded"] = {}
    for name, more in {"fsdp": {}, "chunks": {"grad_cache_chunk_size": 3}, "bf16": {"bf16": True}}.items():
        trainer = make_trainer(folder, name, 12 // n, fsdp=True, **more)
        before = trainer.evaluate()["eval_mean_recall"]
        trainer.train()
        trainer.save_model()
        block = trainer.model.visual.blocks[0].mlp.c_fc.weight
        shares = block.to_local().numel() / block.numel()
        metrics = trainer.evaluate()
        log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found["sharded"][name] = {"before": before, "metrics": metrics, "share": shares, "loss": log}

    resumed = make_trainer(folder, "fsdp", 12 // n, fsdp=True, load_best_model_at_end=False)
    resumed.train(str(folder / "fsdp" / "checkpoint-2"))
    resumed.save_model(str(folder / "resumed"))
    if first:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
