"""Evaluation without an evaluation set: a share of the training images is held out, and the batch follows the data."""

import copy
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from miniclip.datasets.mixture import Mixture
from miniclip.datasets.records import image_faults
from miniclip.datasets.remote import RemoteImage
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256
from miniclip.utils.image_files import ImageError, ImageFile

SHARE = 0.1  # of the images, by default
MANY = 100_000  # images in shards and tables, of which by default nothing is held out: each would have to be read


def hold_out(records: Sequence[dict], share: float | None, seed: int, name: str):
    """Splits training records into some to train on and some to measure: `(records, held-out records or None, line)`.

    All records of an image are on one side, also where its file has copies, in shards too; held out they are one
    record. What is drawn depends on the records, their order and the seed alone. A `share` of None is a tenth; at least
    two images are held out and at least two are left. Raises InputError if a given share cannot be held out."""
    how = "--eval_file measures other images, --holdout 0 trains on all of these"
    handles = not isinstance(records, list)
    if handles and share is None and len(records) > MANY:
        return records, None, f"nothing is held out of {len(records):,} images in shards or tables: {how}"
    images = [] if handles and len(records) < 4 else _identify(record["image"] for record in records)
    unique = list(dict.fromkeys(images))
    if len(unique) < 4:
        few = f"{name}: {len(records)} records with fewer than 4 images are too few to hold any out"
        if share is not None:
            raise InputError(f"{few}. Use --eval_file, or --holdout 0 to measure nothing")
        return records, None, f"{few}: nothing is measured. {how}"
    number = min(max(2, round((SHARE if share is None else share) * len(unique))), len(unique) - 2)
    drawn = set(random.Random(f"holdout {seed}").sample(range(len(unique)), number))
    chosen = {image for place, image in enumerate(unique) if place in drawn}
    held = [row for row, image in enumerate(images) if image in chosen]
    if handles or any(isinstance(images[row], RemoteImage) for row in held):
        # Not checked yet; a damaged one stays in training, which replaces and lists it.
        faults = image_faults(take(records, held), name)
        chosen -= {images[row] for row, fault in zip(held, faults) if fault}
        if not chosen:
            raise InputError(f"{name}: no image that was drawn to be held out can be read. The first: {faults[0]}")
        held = [row for row, image in enumerate(images) if image in chosen]
    kept, found = [row for row, image in enumerate(images) if image not in chosen], {}
    for row in held:
        record = records[row]
        found.setdefault(images[row], (record["image"], {}))[1].update(dict.fromkeys(record["caption"]))
    held_out = [{"image": image, "caption": list(texts)} for image, texts in found.values()]
    line = f"held out to measure: {len(chosen)} of {len(unique)} images, drawn by seed {seed} ({how})"
    return take(records, kept), held_out, line


def _identify(images: Iterable) -> list:
    """Something equal for equal images: an ImageFile's key; a file's path, or its sha256 where sizes are equal or there
    are ImageFiles; on a store an image's address, because to compare the contents would be to read them all."""
    found = list(images)
    files = (image for image in found if not isinstance(image, ImageFile))
    sizes = {image: os.path.getsize(image) for image in files if os.path.isfile(image)}  # others are found when read
    times, inside = Counter(sizes.values()), any(type(image) not in (str, RemoteImage) for image in found)
    content = {image: bytes.fromhex(sha256(image)) for image, size in sizes.items() if inside or times[size] > 1}
    return [content.get(image) or _key(image) for image in found]


def _key(image: str | ImageFile):
    if isinstance(image, str | RemoteImage):
        return image
    try:
        return image.key()
    except ImageError:
        return str(image)


def take(records: Sequence[dict], rows: list[int]) -> Sequence[dict]:
    """Returns some records of a source in any form."""
    if isinstance(records, list):
        return [records[row] for row in rows]
    if isinstance(records, Mixture):
        starts = records.ends - records.sizes
        numbers = np.array(rows, np.int64)
        inside = [numbers[(numbers >= start) & (numbers < end)] - start for start, end in zip(starts, records.ends)]
        parts = [take(source, part.tolist()) for source, part in zip(records.sources, inside)]
        return Mixture(parts, None if records.plain else records.factors, records.num_samples)
    if isinstance(records, Sequence):  # shards and tables
        part = copy.copy(records)
        part.rows = records.rows[rows]
        return part
    return records.select(rows)  # an Arrow table


def epoch_length(records: Sequence[dict]) -> int:
    """Returns the number of pairs in an epoch."""
    order = records.sampler(0, 0) if isinstance(records, Mixture) else None
    return len(records) if order is None else len(order)


def fit_batch(args, number: int, given: bool):
    """Lowers the batch of all processes to the `number` of pairs in an epoch, unless its size was `given`. Returns a
    line about that, or None. Raises InputError if no batch can be made, before anything slow has run."""
    batch = args.per_device_train_batch_size * args.world_size
    if number < (least := max(2, args.world_size)):
        pairs = "1 pair" if number == 1 else f"{number} pairs"
        fix = "Add images" + " or start fewer processes" * (args.world_size > 2)
        raise InputError(f"{pairs} to train on: {least} at least are needed, to tell them apart. {fix}")
    if number >= batch or not args.dataloader_drop_last:
        return None
    size = number // args.world_size
    if given:
        fix = f"Use --per_device_train_batch_size {size}, or leave it out: the batch then follows the data"
        raise InputError(f"{number} pairs do not fill a batch of {batch}. {fix}")
    args.per_device_train_batch_size = size
    return f"the batch is {size * args.world_size} pairs: there are {number}, fewer than the usual {batch}"
