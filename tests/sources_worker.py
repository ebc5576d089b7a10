"""Started, in several processes, from test_sources.py: which samples each process gets, to a file of each."""

import json
import os

import torch
from accelerate import skip_first_batches

from miniclip.config import MiniClipConfig, PreprocessConfig
from miniclip.datasets.read import read_source
from miniclip.model import MiniClip
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.streaming import StreamDataset
from miniclip.training.trainer import RunTrainer
from miniclip.transforms import Preprocess
from miniclip.utils.command_line import run


def collate(items: list[dict]) -> dict:
    return {"number": torch.tensor([int(item["caption"].split()[1]) for item in items])}


def main(cases_file: str, output: str):
    torch.set_num_threads(1)
    cases, results = json.loads(open(cases_file).read()), {}
    model = MiniClip(MiniClipConfig.from_dict(cases.pop("config")))
    for name, case in cases.items():
        args = RunArguments(
            output, use_cpu=True, per_device_train_batch_size=case["batch"], max_steps=case.get("max_steps", -1),
            seed=5, dataloader_num_workers=case["workers"],
        )  # fmt: skip
        make, records = RunDataset, None
        if case.get("streaming"):
            make = StreamDataset.opened(case["source"], args, num_samples=case.get("num_samples"))
        else:
            records = read_source(case["source"], factors=case.get("factors"), num_samples=case.get("num_samples"))
        preprocess = Preprocess(PreprocessConfig(size=8))
        dataset = make(records, preprocess, seed=5)
        trainer = RunTrainer(model, args, dataset, preprocess=preprocess, tokenizer=None)
        trainer.data_collator = collate
        loader, epochs = trainer.get_train_dataloader(), []
        for epoch in range(case.get("epochs", 2)):
            dataset.set_epoch(epoch)
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            steps = iter(loader)
            many = case.get("max_steps") or len(loader)
            batches = [next(steps)["number"].tolist() for _ in range(many)]
            ended = case.get("max_steps") or next(steps, None) is None
            resumed = skip_first_batches(loader, 1)
            resumed.set_epoch(epoch)  # as the Trainer does
            skipped = batches[1:]
            if epoch or not case["workers"]:  # which take long to start
                skipped = [batch["number"].tolist() for _, batch in zip(range(many - 1), resumed)]
            epochs.append({"batches": batches, "ended": bool(ended), "resumes": skipped == batches[1:]})
        results[name] = epochs
    with open(f"{output}.{os.environ.get('RANK', 0)}", "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    run(lambda argv: main(*argv))
