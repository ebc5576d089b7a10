"""Which pairs does the model see? Caption files, checked before anything starts, and the batches made from them."""

import hashlib
import json
import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from miniclip.config import InputError
from miniclip.transforms import ImageError, open_image


class CaptionFileError(InputError):
    """A caption file that cannot be used as it is; lists its bad records."""


def read_captions(
    path: str | Path, image_root: str | Path | None = None, check_images: bool = True, on_bad: str = "error"
) -> list[dict]:
    """Reads and checks a caption file: `[{"image": "dogs\\\\rex.jpg", "caption": ["a dog", "my dog Rex"]}, ...]`.

    Gives `[{"image": absolute path, "caption": [strings]}, ...]`. Image paths start at `image_root` (the file's own
    folder unless given) and may not leave it; either separator will do; a caption may be one string. `check_images`
    decodes every image once, to find damaged ones before they stop a run. Raises CaptionFileError with the number,
    the image and the fault of all bad records together; with on_bad="skip" they are left out, with a warning.
    """
    path = Path(path)
    root = Path(os.path.abspath(image_root or path.parent))
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CaptionFileError(f"{path}: no such file") from None
    except ValueError as error:
        raise CaptionFileError(f"{path}: no JSON: {error}") from None
    if not isinstance(raw, list) or not raw:
        raise CaptionFileError(f"{path}: expected a list of records, found {str(raw)[:60]}")

    records, problems = [], {}
    for index, record in enumerate(raw):
        try:
            records.append((index, _check_record(record, root)))
        except ValueError as error:
            problems[index] = str(error)
    if check_images:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = pool.map(_image_fault, (record["image"] for _, record in records))
            progress = tqdm(faults, f"checking the images of {path.name}", len(records), disable=len(records) < 1000)
            problems |= {index: fault for (index, _), fault in zip(records, progress) if fault}
    good = [record for index, record in records if index not in problems]
    if problems:
        lines = [f"  record {index}: {problems[index]}" for index in sorted(problems)]
        report = "\n".join([f"{path}: {len(problems)} of {len(raw)} records cannot be used:", *lines])
        if on_bad != "skip" or not good:
            way_out = ", or go on without them by --bad_records skip" if good else "; no record would be left"
            raise CaptionFileError(f"{report}\nMend or remove them{way_out}.")
        warnings.warn(f"{report}\nThe other {len(good)} are used.", stacklevel=2)
    return good


def _check_record(record, root: Path) -> dict:
    """One record in the form that the rest relies on; ValueError says what is wrong with it."""
    if not isinstance(record, dict) or not {"image", "caption"} <= record.keys():
        raise ValueError(f"expected an object with image and caption, found {str(record)[:60]}")
    image, captions = record["image"], record["caption"]
    if not isinstance(image, str) or not image:
        raise ValueError(f"image is no path: {image!r}")
    # Compared as text: links that the user put into the folder may lead elsewhere, the file's own `..` may not.
    file = os.path.abspath(root / image.replace("\\", "/"))
    if not Path(file).is_relative_to(root):
        raise ValueError(f"{image}: leads out of the image folder {root}")
    if not os.path.isfile(file):
        raise ValueError(f"{image!r}: there is no such file in {root}")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        raise ValueError(f"{image}: caption is neither a string nor a list of some: {str(captions)[:60]}")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{image}: caption {number} is no text: {str(caption)[:60]!r}")
        if any("\ud800" <= character <= "\udfff" for character in caption):  # half an emoji: Arrow cannot hold it
            raise ValueError(f"{image}: caption {number} is no valid Unicode: {caption[:60]!a}")
    return {"image": file, "caption": captions}


def _image_fault(path: str) -> str | None:
    try:
        open_image(path, scale=32)  # reads every byte all the same; `verify` would pass half a JPEG
    except ImageError as error:
        return str(error)


def flatten_captions(records: list[dict]) -> tuple[list[str], list[int]]:
    """All captions in order, and the number of the record that each belongs to."""
    texts = [caption for record in records for caption in record["caption"]]
    return texts, [i for i, record in enumerate(records) for _ in record["caption"]]


class CaptionDataset(Dataset):
    """Pairs for training: item i is image i, freshly cropped, and one of its captions, drawn anew every epoch.

    What is drawn depends on (seed, epoch, index) and on nothing else, so that a run can be repeated and resumed
    exactly, whatever the number of workers. `transform` augments (a TrainTransform); without one `preprocess` is used.
    `pixel_values` are levels (3, S, S), uint8: the trainer normalises them, where the model is. `pair_ids`
    are two numbers, the one equal for the same file and the other for the same words (`pair_ids`).
    """

    def __init__(self, records: list[dict], preprocess, seed: int = 0, transform=None):
        import datasets  # slow to import

        # In an Arrow table the records lie outside Python's heap, and worker processes share them instead of copying.
        self.records = datasets.Dataset.from_list(records)
        self.preprocess, self.seed, self.transform = preprocess, seed, transform
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change

    def set_epoch(self, epoch: int):
        """Chooses the captions and crops of an epoch."""
        self.epoch.fill_(epoch)

    def rng(self, index: int) -> random.Random:
        """What an item's draws of this epoch are taken from, the caption first."""
        return random.Random(f"{self.seed} {self.epoch.item()} {index}")

    def __len__(self) -> int:
        return len(self.records)

    def pair_ids(self, index: int) -> tuple[int, int]:
        """Of an item of this epoch, without reading its image."""
        record = self.records[index]
        return pair_ids(record["image"], record["caption"][self.rng(index).randrange(len(record["caption"]))])

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        rng = self.rng(index)
        caption = record["caption"][rng.randrange(len(record["caption"]))]
        image = open_image(record["image"], (self.transform or self.preprocess).scale)
        levels = self.transform.levels(image, rng) if self.transform else self.preprocess.levels(image)
        return {"pixel_values": levels, "caption": caption, "pair_ids": pair_ids(record["image"], caption)}


def pair_ids(image: str, caption: str) -> tuple[int, int]:
    """64-bit numbers that tell pictures by their file, and captions by their words, letter case and spaces apart."""
    names = str(image), " ".join(caption.lower().split())
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return tuple(int.from_bytes(digest, "big", signed=True) for digest in digests)


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
            batch["input_ids"] = F.pad(ids, (0, min(-ids.shape[1] % self.multiple, room)))
        return batch
