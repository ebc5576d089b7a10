"""Started, in several processes, from test_fsdp.py: what several processes compute, written by the first of them."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

import miniclip
from miniclip.classify.evaluator import make_evaluator
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.loss import clip_loss
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.trainer import RunTrainer
from miniclip.utils.command_line import run


def make_trainer(folder: Path, output: str, per_device: int, model=None, **more) -> RunTrainer:
    """A trainer of a small model (`model_dir`, unless a model is given) for four steps of 12 pairs."""
    args = RunArguments(
        str(folder / output), use_cpu=True, bf16=more.pop("bf16", False), per_device_train_batch_size=per_device,
        max_steps=4, learning_rate=1e-2, adam_epsilon=1e-3, disable_tqdm=True, logging_steps=1, **more,
    )  # fmt: skip
    model = model or miniclip.load(folder / "model_dir")[0]
    records = miniclip.read_captions(folder / "captions.json")
    preprocess, tokenizer = miniclip.Preprocess(model.config.preprocess_cfg), miniclip.Tokenizer(16)
    dataset = RunDataset(records, preprocess, seed=args.seed)
    eval_records = miniclip.read_captions(folder / "odd.json")
    evaluator = make_evaluator(eval_records, folder / "classes", preprocess, tokenizer)
    return RunTrainer(model, args, dataset, preprocess=preprocess, tokenizer=tokenizer, evaluator=evaluator)


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


def evaluate_two(trainer: RunTrainer, folder: Path) -> dict:
    """Metrics of fewer images than there are processes."""
    records = miniclip.read_captions(folder / "odd.json")[:2]
    evaluator = trainer.measured_by.parts[0]
    trainer.measured_by = RetrievalEvaluator(records, evaluator.preprocess, evaluator.tokenizer)
    return trainer.evaluate()


def evaluate(folder: Path) -> dict:
    """Metrics of the set that does not divide and of one smaller than there are processes, and the loss's memory."""
    trainer = make_trainer(folder, "ddp", 4)
    metrics, of_two = trainer.evaluate(), evaluate_two(trainer, folder)
    return {"metrics": metrics, "of_two": of_two, "kept": bytes_kept_by_the_loss(1200 // trainer.args.world_size)}


def train_sharded(folder: Path, name: str, **more) -> dict:
    """What FSDP makes of the four steps: metrics before and after, losses, and the share of a weight that is here."""
    trainer = make_trainer(folder, name, 12 // int(os.environ["WORLD_SIZE"]), fsdp=True, **more)
    before = trainer.evaluate()["eval_mean_recall"]
    trainer.train()
    trainer.save_model()
    weight = trainer.model.visual.blocks[0].mlp.c_fc.weight
    return {
        "before": before, "after": trainer.evaluate()["eval_mean_recall"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "share": weight.to_local().numel() / weight.numel(),
    }  # fmt: skip


def main(folder: Path, what: str):
    found = {}
    if what == "quick":
        found = evaluate(folder) | {"fsdp": train_sharded(folder, "fsdp", save_strategy="no")}
    else:
        for name, more in {
            "chunks": {"grad_cache_chunk_size": 3}, "bf16": {"bf16": True},
            "checkpointing": {"gradient_checkpointing": True},
            "by_fsdp": {"fsdp_config": {"activation_checkpointing": True}},
            "accumulation": {"gradient_accumulation_steps": 2},
        }.items():  # fmt: skip
            found[name] = train_sharded(folder, name, save_strategy="no", **more)
        train_sharded(folder, "saved", save_strategy="steps", save_steps=2)
        resumed = make_trainer(folder, "saved", 12 // int(os.environ["WORLD_SIZE"]), fsdp=True, save_strategy="no")
        resumed.train(str(folder / "saved" / "checkpoint-2"))
        resumed.save_model(str(folder / "resumed"))
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    run(lambda argv: main(Path(argv[0]), argv[1]))
