"""Data workers of a run: they live on from epoch to epoch, change no batch, and copy little of the trainer's memory."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import miniclip
from miniclip.model import MiniClip
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.streaming import StreamDataset
from miniclip.training.trainer import RunTrainer
from miniclip.utils.machine import keep_freed_memory
from tests.check_gradients_worker import write_stream

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
FREED = 300 << 20  # bytes


class Watched(RunTrainer):
    """Notes of each step the batch, the worker that read it, and whether that ignores Ctrl-C."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        pid = int(self.train_dataset.reading[0, 0])
        self.seen.append(({name: inputs[name].clone() for name in ("row", "pixel_values", "input_ids")}, pid))
        if self.args.dataloader_persistent_workers:  # which is there for sure
            (ignored,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigIgn" in line)
            assert int(ignored.split()[1], 16) >> (signal.SIGINT - 1) & 1
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(folder: Path, config, run: str, resume: str | None = None, **arguments) -> list:
    """Trains for two epochs of three batches, with a checkpoint after each. Returns what was seen."""
    args = RunArguments(
        str(folder / run), use_cpu=True, bf16=False, per_device_train_batch_size=8, num_train_epochs=2,
        save_strategy="steps", save_steps=1, save_total_limit=None, disable_tqdm=True, report_to="none", **arguments,
    )  # fmt: skip
    preprocess, tokenizer, make = miniclip.Preprocess(config.preprocess_cfg), miniclip.Tokenizer(16), RunDataset
    records = miniclip.read_captions(folder / "captions.json")
    if run.startswith("stream"):
        write_stream(folder)
        make = StreamDataset.opened(str(folder / "captions.parquet"), args, num_samples=24)
    trainer = Watched(MiniClip(config), args, make(records, preprocess), preprocess=preprocess, tokenizer=tokenizer)
    trainer.seen = []
    trainer.train(resume and str(folder / resume))
    return trainer.seen


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x[name], y[name]) for (x, _), (y, _) in zip(a, b) for name in x)


@pytest.mark.parametrize("kind", ["records", "stream"])
def test_workers_live_on_and_change_no_batch(kind, caption_set, tiny_config):
    one = {"dataloader_num_workers": 1}
    kept = train(caption_set, tiny_config, f"{kind}-kept", **one)
    anew = train(caption_set, tiny_config, f"{kind}-anew", **one, dataloader_persistent_workers=False)
    alone = train(caption_set, tiny_config, f"{kind}-alone", dataloader_num_workers=0)
    assert len(alone) == 6 and same(kept, anew) and same(kept, alone)
    assert not same(kept[:3], kept[3:])  # the second epoch draws others
    pids = [[pid for _, pid in run] for run in (kept, anew, alone)]
    assert len(set(pids[0])) == 1 and len(set(pids[1])) == 2 and set(pids[2]) == {0}
    resumed = train(caption_set, tiny_config, f"{kind}-resumed", f"{kind}-kept/checkpoint-2", **one)
    assert same(resumed, kept[2:])
    ended = {pid for _, pid in kept + anew + resumed}
    assert not any(Path(f"/proc/{pid}").exists() for pid in ended - {os.getpid()})


def test_workers_are_kept_where_there_are_any(tmp_path):
    for workers, given, kept in ((0, None, False), (2, None, True), (2, False, False), (2, True, True)):
        more = {"dataloader_num_workers": workers, "dataloader_persistent_workers": given}
        assert RunArguments(str(tmp_path), use_cpu=True, **more).dataloader_persistent_workers is kept


def test_a_worker_holds_nothing_that_the_trainer_has_freed(caption_set, tiny_config):
    """The trainer overwrites it in the next step: what the worker held would then be there twice."""
    keep_freed_memory()  # as RunTrainer does
    records = miniclip.read_captions(caption_set / "captions.json")
    dataset = RunDataset(records, miniclip.Preprocess(tiny_config.preprocess_cfg))
    torch.ones(FREED // 4)
    batches = iter(torch.utils.data.DataLoader(dataset, 4, num_workers=1, collate_fn=lambda items: len(items)))
    assert next(batches) == 4
    again = torch.ones(FREED // 4)
    lines = Path(f"/proc/{int(dataset.reading[0, 0])}/smaps_rollup").read_text().splitlines()
    (held,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))
    assert held < FREED / 2 < again.nbytes, f"{held >> 20} MiB"
