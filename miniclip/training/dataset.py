"""Training data of a real run: bad samples replaced and listed, workers that say what they read, uint8 pixels."""

import logging
import os
import random
import signal
from contextlib import suppress

import torch
from PIL import Image
from torch import Tensor

from miniclip.data import CaptionDataset
from miniclip.datasets.mixture import Mixture
from miniclip.utils.bad_samples import BadSamples
from miniclip.utils.image_files import ImageError
from miniclip.utils.machine import return_freed_memory
from miniclip.utils.parallel import as_table

logger = logging.getLogger(__name__)
GRACE = 30  # seconds that a data worker stays alive after a SIGTERM to all processes of a run
MAX_BAD = 100  # more bad samples in a row than that are no accident: the disk may be gone


class RunDataset(CaptionDataset):
    """A CaptionDataset for RunTrainer, which survives bad samples.

    `pixel_values` are levels (3, S, S), uint8: the trainer normalises them on the model's device. `row` identifies the
    item in messages (`label`). An image that cannot be read is logged, counted in `bad`, listed in `bad_samples`, and
    the next good one takes its place; with `on_bad` "stop" it raises ImageError."""

    def __init__(self, records, preprocess, seed=0, transform=None, on_bad: str | None = None, bad_samples=None):
        super().__init__(as_table(records), preprocess, seed, transform)
        self.on_bad = on_bad
        self.bad_samples = BadSamples() if bad_samples is None else bad_samples
        self.bad = torch.zeros(256, dtype=torch.long).share_memory_()  # number of bad samples, by worker
        self.reading = torch.zeros(256, 4, dtype=torch.long).share_memory_()  # each worker's process, and its row

    def sampler(self, args):
        """The order of an epoch, a Sampler that draws from (seed, epoch). None for the Trainer's, a shuffle."""
        return self.records.sampler(self.seed, self.epoch) if isinstance(self.records, Mixture) else None

    def dataloader(self, args, collate):
        """The batches of this process, if the dataset makes them itself. None for the Trainer's."""

    def __getitem__(self, index: int) -> dict:
        for step in range(MAX_BAD):
            try:
                return {"row": self.note(index + step), **self.item(index + step)}
            except ImageError as error:
                if self.on_bad == "stop" or step + 1 == MAX_BAD:
                    raise
                number = (index + step) % len(self)
                name = f"sample {number}"
                with suppress(ImageError):  # unless its record cannot be read
                    name = str(self.records[number]["image"])
                self.report(name, error)

    def item(self, index: int) -> dict:
        """Item `index`; raises ImageError for an image that cannot be used."""
        return super().__getitem__(index)

    def pixels(self, image: Image.Image, rng: random.Random) -> Tensor:
        """The levels of an image, (3, S, S) uint8."""
        return self.transform.levels(image, rng) if self.transform else self.preprocess.levels(image)

    def note(self, *row: int) -> Tensor:
        """Notes for the main process what this worker reads, and returns it in the form that `label` takes, (3,)."""
        row = torch.tensor((*row, 0, 0)[:3])
        if worker := torch.utils.data.get_worker_info():
            place = self.reading[worker.id % len(self.reading)]
            if place[0] != os.getpid():  # its first item; here, as a resumed epoch has a loader of accelerate's own
                prepare_worker()
            place[:] = torch.cat([torch.tensor([os.getpid()]), row])
        return row

    def label(self, row) -> dict:
        """The record, image and caption of an item of this epoch, by its `row`."""
        index = int(row[0])
        record = self.records[index % len(self)]
        caption = record["caption"][self.rng(index).randrange(len(record["caption"]))]
        return {"record": index % len(self), "image": str(record["image"]), "caption": caption}

    def report(self, name: str, error: Exception):
        """Logs, counts and lists a bad sample."""
        self.bad_samples.add(name, str(error).removeprefix(f"{name}: "), f"epoch {self.epoch.item()}")
        worker = torch.utils.data.get_worker_info()
        self.bad[(worker.id + 1) % len(self.bad) if worker else 0] += 1
        logger.warning("%s; the next one takes its place", error)


def prepare_worker():
    """Makes this process, a data worker, ignore Ctrl-C and outlive a SIGTERM by GRACE seconds: the run needs it to
    finish its step when a signal goes to all processes. Gives back what the trainer had freed when it was forked: the
    trainer uses that memory again, and the worker would keep a copy."""
    return_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
