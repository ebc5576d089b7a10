"""Which pairs does the model see? One caption of each image an epoch, and the batches made of them."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from miniclip.utils.image_files import BufferedImage, ImageFile, open_image


class CaptionDataset(Dataset):
    """Pairs for training: item i is image i and one of its captions, drawn anew every epoch.

    `records` are `[{"image": path or ImageFile, "caption": [strings]}, ...]`. What is drawn depends on (seed, epoch,
    index) and on nothing else, so that a run can be repeated and resumed exactly, whatever the number of workers.
    `transform(image, rng)` augments (`training/augment.py`); without one the image is prepared as in evaluation. An
    index of n or more is another draw of item index - n. Raises ImageError for an image that cannot be read."""

    def __init__(self, records: Sequence[dict], preprocess, seed: int = 0, transform=None):
        self.records, self.preprocess, self.seed, self.transform = records, preprocess, seed, transform
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int):
        """Chooses the captions and crops of an epoch."""
        self.epoch.fill_(epoch)

    def rng(self, index) -> random.Random:
        """The generator of an item's draws in this epoch, the caption first."""
        return random.Random(f"{self.seed} {self.epoch.item()} {index}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.draw(self.records[index % len(self)], self.rng(index))

    def draw(self, record: dict, rng: random.Random) -> dict:
        """One caption and one crop of a record: `pixel_values` (3, S, S), `caption`, and `pair_ids`, two numbers of
        which the first is the same for the same image and the second for the same words."""
        caption = record["caption"][rng.randrange(len(record["caption"]))]
        file = BufferedImage(record["image"]) if isinstance(record["image"], ImageFile) else record["image"]
        image = open_image(file, (self.transform or self.preprocess).scale)
        ids = image_id(file), text_id(caption)
        return {"pixel_values": self.pixels(image, rng), "caption": caption, "pair_ids": ids}

    def pixels(self, image: Image.Image, rng: random.Random) -> Tensor:
        """The tensor made of an image, (3, S, S) float32."""
        return self.transform(image, rng) if self.transform else self.preprocess(image)


def image_id(image: str | Path | ImageFile) -> int:
    """A number that identifies an image: a file by its path, an ImageFile by its content."""
    return _number(image.key() if isinstance(image, ImageFile) else str(image).encode())


def text_id(caption: str) -> int:
    """A 64-bit number that identifies a caption by its words; letter case and spaces do not count."""
    return _number(" ".join(caption.lower().split()).encode())


def _number(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big", signed=True)


class Collator:
    """Makes a batch of items: the captions' `input_ids` (B, L), and the stacked rest. L, the length of the longest one,
    is rounded up to a multiple of `multiple`: a GPU likes 8, and a compiled model few different lengths."""

    def __init__(self, tokenize, multiple: int = 1):
        # Not called `tokenizer`: Trainer would take it for one of its own and try to save it.
        self.tokenize, self.multiple = tokenize, multiple

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        names = items[0].keys() - {"caption"}
        batch = {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in sorted(names)}
        if "caption" in items[0]:
            ids = self.tokenize([item["caption"] for item in items], trim=True)
            room = min(-ids.shape[1] % self.multiple, self.tokenize.context_length - ids.shape[1])
            batch["input_ids"] = F.pad(ids, (0, room), value=self.tokenize.pad_token_id)
        return batch
