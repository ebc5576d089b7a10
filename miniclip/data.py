"""Which pairs does the model see? Caption files, checked before anything starts, and the batches made from them."""

import hashlib
import json
import logging
import os
import random
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from miniclip.config import InputError
from miniclip.transforms import ImageError, open_image

logger = logging.getLogger(__name__)
MAX_BAD = 100  # more bad samples in a row than that are no accident


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
    return check_records(path, raw, root, check_images, on_bad)


def check_records(path, raw: list, root: Path, check_images: bool = True, on_bad: str = "error", names=None):
    """Checks raw records, of whatever file they come, as `read_captions` says. An InputError in the place of a record
    is reported like any other fault; `names` has what to call each (record 0, record 1, ... unless given)."""
    path, names = Path(path), names or [f"record {index}" for index in range(len(raw))]
    records, problems = [], {}
    for index, record in enumerate(raw):
        try:
            records.append((index, _check_record(record, root)))
        except ValueError as error:
            problems[index] = str(error)
    if check_images:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = pool.map(image_fault, (record["image"] for _, record in records))
            progress = tqdm(faults, f"checking the images of {path.name}", len(records), disable=len(records) < 1000)
            problems |= {index: fault for (index, _), fault in zip(records, progress) if fault}
    good = [record for index, record in records if index not in problems]
    if problems:
        lines = [f"  {names[index]}: {problems[index]}" for index in sorted(problems)]
        report = "\n".join([f"{path}: {len(problems)} of {len(raw)} records cannot be used:", *lines])
        if on_bad != "skip" or not good:
            way_out = ", or go on without them by --bad_records skip" if good else "; no record would be left"
            raise CaptionFileError(f"{report}\nMend or remove them{way_out}.")
        warnings.warn(f"{report}\nThe other {len(good)} are used.", stacklevel=3)
    return good


def _check_record(record, root: Path) -> dict:
    """One record in the form that the rest relies on; ValueError says what is wrong with it."""
    if isinstance(record, InputError):
        raise record
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
    return {"image": file, "caption": check_captions(captions, image)}


def check_captions(captions, image) -> list[str]:
    """The captions of an image as a list; InputError, naming the image, says what is wrong with them."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        raise InputError(f"{image}: caption is neither a string nor a list of some: {str(captions)[:60]}")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{image}: caption {number} is no text: {str(caption)[:60]!r}")
        if any("\ud800" <= character <= "\udfff" for character in caption):  # half an emoji: Arrow cannot hold it
            raise InputError(f"{image}: caption {number} is no valid Unicode: {caption[:60]!a}")
    return captions


def image_fault(path) -> str | None:
    """What is wrong with a picture, if anything is."""
    try:
        open_image(path, scale=32)  # reads every byte all the same; `verify` would pass half a JPEG
    except ImageError as error:
        return str(error)


def flatten_captions(records: Sequence[dict]) -> tuple[list[str], list[int]]:
    """All captions in order, and the number of the record that each belongs to."""
    captions = [record["caption"] for record in records]
    return [text for texts in captions for text in texts], [i for i, texts in enumerate(captions) for _ in texts]


def as_table(records: Sequence[dict]) -> Sequence[dict]:
    """A list of records as an Arrow table: there they lie outside Python's heap, and worker processes share them
    instead of copying. Other sequences as they are."""
    import datasets  # slow to import

    return datasets.Dataset.from_list(records) if isinstance(records, list) else records


class CaptionDataset(Dataset):
    """Pairs for training: item i is image i, freshly cropped, and one of its captions, drawn anew every epoch.

    What is drawn depends on (seed, epoch, index) and on nothing else, so that a run can be repeated and resumed
    exactly, whatever the number of workers. `transform` augments (a TrainTransform); without one `preprocess` is used.
    `pixel_values` are levels (3, S, S), uint8: the trainer normalises them, where the model is. `pair_ids` are two
    numbers, the one equal for the same picture and the other for the same words (`pair_ids`).

    `records` are a list, or any sequence of such (`miniclip.sources`). There an image may be a handle: it has `read`,
    which gives its bytes, and `str` names it. Those are not checked in advance: one that cannot be used is reported,
    counted in `bad`, and the next sound one takes its place. An index of n or more is another draw of item index - n.
    """

    def __init__(self, records: Sequence[dict], preprocess, seed: int = 0, transform=None):
        self.records, self.checked = as_table(records), isinstance(records, list)
        self.preprocess, self.seed, self.transform = preprocess, seed, transform
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change
        self.bad = torch.zeros(256, dtype=torch.long).share_memory_()  # what each worker could not use

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

    def pair_ids(self, index: int) -> tuple[int, int]:
        """Of an item of this epoch, without reading its image."""
        record = self.records[index % len(self)]
        return pair_ids(record["image"], record["caption"][self.rng(index).randrange(len(record["caption"]))])

    def __getitem__(self, index: int) -> dict:
        for step in range(MAX_BAD):
            try:
                return self.item(index + step)
            except ImageError as error:
                if self.checked or step + 1 == MAX_BAD:  # then it is no single sample: the disk may be gone
                    raise
                self.report(error)

    def report(self, error: Exception):
        """Says and counts that a sample cannot be used."""
        worker = torch.utils.data.get_worker_info()
        self.bad[(worker.id + 1) % len(self.bad) if worker else 0] += 1
        logger.warning("%s; the next one takes its place", error)

    def item(self, index: int) -> dict:
        """Item `index`; raises ImageError for a picture that cannot be used."""
        return self.draw(self.records[index % len(self)], self.rng(index))

    def draw(self, record: dict, rng: random.Random) -> dict:
        """One caption and one crop of a record."""
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
