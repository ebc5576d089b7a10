"""Which pairs does the model see? One caption of each image an epoch, and the batches made of them."""

import hashlib
import logging
import os
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from miniclip.utils.bad_samples import BadSamples
from miniclip.utils.image_files import ImageError, open_image
from miniclip.utils.parallel import as_table

logger = logging.getLogger(__name__)
MAX_BAD = 100  # more bad samples in a row than that are no accident


class CaptionDataset(Dataset):
    """Pairs for training: item i is image i, freshly cropped, and one of its captions, drawn anew every epoch.

    What is drawn depends on (seed, epoch, index) and on nothing else, so that a run can be repeated and resumed
    exactly, whatever the number of workers. `transform` augments (a TrainTransform); without one `preprocess` is used.
    `pixel_values` are levels (3, S, S), uint8: the trainer normalises them, where the model is. `pair_ids` are two
    numbers, the one equal for the same picture and the other for the same words (`image_id`, `text_id`). `row` says
    which item it is, should something be wrong with it (`label`).

    `records` are a list, or any sequence of such (`miniclip.datasets.read`). There an image may be a handle: `read`
    gives its bytes, and `str` names it. Those are not checked in advance: one that cannot be used is reported, counted
    in `bad`, listed in `bad_samples`, and the next sound one takes its place; or, where `on_bad` is "stop", raises
    ImageError. An index of n or more is another draw of item index - n.
    """

    def __init__(
        self, records: Sequence[dict], preprocess, seed: int = 0, transform=None, on_bad: str | None = None,
        bad_samples: BadSamples | None = None,
    ):  # fmt: skip
        self.records, self.on_bad = as_table(records), on_bad
        self.bad_samples = BadSamples() if bad_samples is None else bad_samples
        self.preprocess, self.seed, self.transform = preprocess, seed, transform
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change
        self.bad = torch.zeros(256, dtype=torch.long).share_memory_()  # what each worker could not use
        self.reading = torch.zeros(256, 4, dtype=torch.long).share_memory_()  # its process, and the row it is at

    def sampler(self, args):
        """The order of an epoch, a torch Sampler that draws from (seed, epoch); None for the Trainer's, a shuffle."""
        make = getattr(self.records, "sampler", None)
        return make and make(self.seed, self.epoch)

    def set_epoch(self, epoch: int):
        """Chooses the captions and crops of an epoch."""
        self.epoch.fill_(epoch)

    def rng(self, index: int) -> random.Random:
        """What an item's draws of this epoch are taken from, the caption first."""
        return random.Random(f"{self.seed} {self.epoch.item()} {index}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        for step in range(MAX_BAD):
            try:
                row = self.note(index + step)
                return self.item(index + step) | {"row": row}
            except ImageError as error:
                if self.on_bad == "stop" or step + 1 == MAX_BAD:  # so many are no accident: the disk may be gone
                    raise
                self.report(self.name(index + step), error)

    def note(self, *row: int) -> Tensor:
        """Writes down, where the main process sees it, what a worker reads now; gives it as `label` wants it: (3,)."""
        row = torch.tensor((*row, 0, 0)[:3])
        if worker := torch.utils.data.get_worker_info():
            self.reading[worker.id % len(self.reading)] = torch.cat([torch.tensor([os.getpid()]), row])
        return row

    def label(self, row) -> dict:
        """Which record, picture and caption an item of this epoch is made of, by the `row` that comes with it."""
        index, record = int(row[0]), self.records[int(row[0]) % len(self)]
        caption = record["caption"][self.rng(index).randrange(len(record["caption"]))]
        return {"record": index % len(self), "image": str(record["image"]), "caption": caption}

    def name(self, index: int) -> str:
        """What to call an item in messages."""
        try:
            return str(self.records[index % len(self)]["image"])
        except ImageError:
            return f"sample {index % len(self)}"

    def report(self, name: str, error: Exception):
        """Says, counts and lists that a sample cannot be used."""
        self.bad_samples.add(name, str(error).removeprefix(f"{name}: "), f"epoch {self.epoch.item()}")
        worker = torch.utils.data.get_worker_info()
        self.bad[(worker.id + 1) % len(self.bad) if worker else 0] += 1
        logger.warning("%s; the next one takes its place", error)

    def item(self, index: int) -> dict:
        """Item `index`; raises ImageError for a picture that cannot be used."""
        return self.draw(self.records[index % len(self)], self.rng(index))

    def draw(self, record: dict, rng: random.Random) -> dict:
        """One caption and one crop of a record."""
        caption = record["caption"][rng.randrange(len(record["caption"]))]
        where = Kept(record["image"]) if hasattr(record["image"], "read") else record["image"]
        image = open_image(where, (self.transform or self.preprocess).scale)
        levels = self.transform.levels(image, rng) if self.transform else self.preprocess.levels(image)
        return {"pixel_values": levels, "caption": caption, "pair_ids": (image_id(where), text_id(caption))}


class Kept:
    """A handle whose bytes were read, once, and are kept."""

    def __init__(self, handle):
        self.handle, self.data = handle, handle.read()

    def read(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return str(self.handle)


def image_id(image) -> int:
    """A 64-bit number that tells pictures: by their path, or those in shards and tables by what is in them."""
    try:
        return _number(image.read() if hasattr(image, "read") else str(image).encode())
    except ImageError:  # it will be reported when its turn comes
        return _number(str(image).encode())


def text_id(caption: str) -> int:
    """A 64-bit number that tells captions by their words, letter case and spaces apart."""
    return _number(" ".join(caption.lower().split()).encode())


def _number(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big", signed=True)


class Collator:
    """Makes a batch of items: `pixel_values` (B, 3, S, S) and `input_ids` (B, L), L the longest caption's length.
    Whatever tensors and numbers an item holds besides its caption are stacked. L is rounded up to a multiple of
    `multiple`: a GPU likes 8, and a compiled model few different lengths."""

    def __init__(self, tokenize, multiple: int = 1):
        # Not called `tokenizer`: Trainer would take it for one of its own and try to save it.
        self.tokenize, self.multiple = tokenize, multiple

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        names = items[0].keys() - {"caption"}
        batch = {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in sorted(names)}
        if "caption" in items[0]:
            ids = self.tokenize([item["caption"] for item in items], trim=True)
            room = self.tokenize.context_length - ids.shape[1]
            batch["input_ids"] = F.pad(
                ids, (0, min(-ids.shape[1] % self.multiple, room)), value=self.tokenize.pad_token_id
            )
        return batch
