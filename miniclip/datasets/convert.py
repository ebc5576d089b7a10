"""How does a data set change its form? `python -m miniclip convert_data FROM TO`."""

import csv
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from miniclip.datasets.shards import ShardWriter, expand
from miniclip.utils.bad_samples import BadSamples, leave_out
from miniclip.utils.errors import InputError
from miniclip.utils.files import scratch_path, sync
from miniclip.utils.image_files import FORMATS, ImageError

logger = logging.getLogger(__name__)


def image_bytes(where) -> bytes:
    """The bytes of a record's image."""
    return where.read() if hasattr(where, "read") else Path(where).read_bytes()


def image_kind(data: bytes) -> str:
    """The extension that a picture's bytes ask for. Raises ImageError for what is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind = image.format.lower()
    except Exception as error:
        raise ImageError(f"no picture ({error})") from None
    return {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}.get(kind, kind)


def convert(
    source: Sequence[dict], target: str, samples_per_shard: int = 10_000, on_bad: str = "skip",
    bad_samples: BadSamples | None = None,
) -> int:  # fmt: skip
    """Writes records to a .json, .jsonl, .csv or .tsv file, or to shards; gives the number written.

    Shards (`out/{000000..000009}.tar`: as many as are named, filled evenly; `out/000000.tar`: counted on from there,
    `samples_per_shard` each) get the images bit by bit. The other forms name image files where they lie, relative to
    the folder of the target if below it; images that are no files are written into a folder `<target>_images` beside
    it. Nothing is overwritten, and what is written appears when it is whole. About images that cannot be read or are
    no picture see `captions.leave_out`. Raises InputError where the target is there already, or is of no known form.
    """
    suffix, faults = Path(target).suffix.lower(), []

    def check(written: int):
        what = f"{len(faults)} of {len(source)} images cannot be used"
        leave_out(target, what, faults, written, "", on_bad, bad_samples)

    if suffix == ".tar":
        return _to_shards(source, target, samples_per_shard, faults, check)
    if suffix not in (".json", ".jsonl", ".csv", ".tsv"):
        raise InputError(f"{target}: expected .json, .jsonl, .csv, .tsv or .tar")
    return _to_file(source, Path(target), faults, check)


def _to_shards(source: Sequence[dict], target: str, samples_per_shard: int, faults: list, check) -> int:
    paths = [Path(path) for path in expand(target)]
    if len(paths) == 1:
        digits = re.search(r"(?:^|[-_])(\d+)$", paths[0].stem)  # 000, shard-000: not coco2017
        many = -(-len(source) // samples_per_shard)
        if digits:
            first, width, before = int(digits[1]), len(digits[1]), paths[0].stem[: digits.start(1)]
            numbers = range(first, first + many)
            paths = [paths[0].with_name(f"{before}{i:0{width}d}.tar") for i in numbers]
        elif many > 1:
            raise InputError(f"{target}: {many} shards of {samples_per_shard} want a number in their name: 000000.tar")
    _refuse(*paths)
    ends = [len(source) * (i + 1) // len(paths) for i in range(len(paths))]
    if len(expand(target)) == 1:
        ends = [min(len(source), samples_per_shard * (i + 1)) for i in range(len(paths))]
    width, written, writers = max(6, len(str(len(source)))), 0, []
    try:
        with tqdm(total=len(source), desc="packing") as progress:
            for path, start, end in zip(paths, [0, *ends], ends):
                with ShardWriter(path) as writer:
                    writers.append(writer)
                    for index in range(start, end):
                        progress.update()
                        if (found := _readable(source, index, faults)) is not None:
                            record, data, kind = found
                            writer.add(f"{index:0{width}d}", data, kind, record["caption"])
                            written += 1
        check(written)
        for writer in writers:
            sync(writer.scratch)
            os.replace(writer.scratch, writer.path)
    finally:
        for writer in writers:
            writer.scratch.unlink(missing_ok=True)
    return written


def _to_file(source: Sequence[dict], target: Path, faults: list, check) -> int:
    images = target.with_name(f"{target.stem}_images")
    own = any(hasattr(record["image"], "read") for record in source)
    _refuse(target, *[images] * own)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch, scratch_images = scratch_path(target), scratch_path(images)
    base, width, records = Path(os.path.abspath(target.parent)), max(6, len(str(len(source)))), []
    files = (record["image"] for record in source if not hasattr(record["image"], "read"))
    outside = any(not Path(file).is_relative_to(base) for file in files)
    if outside and own:
        raise InputError(f"{target}: some images are no files and others lie elsewhere than {base}: convert them apart")
    try:
        for index in tqdm(range(len(source)), "writing"):
            record = None
            try:
                record = source[index]
                is_file = not hasattr(record["image"], "read")
            except ImageError as error:
                faults.append((f"sample {index}", str(error)))
                continue
            if is_file:
                file = Path(record["image"])
                name = str(file) if outside else file.relative_to(base).as_posix()
            elif (found := _readable(source, index, faults)) is not None:
                scratch_images.mkdir(exist_ok=True)
                name = f"{images.name}/{index:0{width}d}.{found[2]}"
                (scratch_images / Path(name).name).write_bytes(found[1])
            else:
                continue
            records.append({"image": name, "caption": record["caption"]})
        check(len(records))
        with open(scratch, "w", encoding="utf-8", newline="") as file:
            if target.suffix.lower() == ".json":
                json.dump(records, file, ensure_ascii=False, indent=1)
            elif target.suffix.lower() == ".jsonl":
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            else:
                delimiter = "\t" if target.suffix.lower() == ".tsv" else ","
                table = csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
                table.writerow(["filepath", "title"])  # OpenCLIP's names
                table.writerows((record["image"], text) for record in records for text in record["caption"])
        sync(scratch)
        if scratch_images.exists():
            os.rename(scratch_images, images)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
        shutil.rmtree(scratch_images, ignore_errors=True)
    if outside:
        logger.warning("%s: the images lie elsewhere than %s: read it with --image_root /", target, base)
    return len(records)


def _readable(source: Sequence[dict], index: int, faults: list):
    """A record, the bytes of its image and their extension; None where that cannot be, and then `faults` has why."""
    record = None
    try:
        record = source[index]
        data = image_bytes(record["image"])
        return record, data, image_kind(data)
    except (ImageError, OSError) as error:
        name = str(record["image"]) if record else f"sample {index}"
        faults.append((name, str(error).removeprefix(f"{name}: ")))
        return None


def _refuse(*paths: Path):
    there = [str(path) for path in paths if path.exists()]
    if there:
        raise InputError(f"{there[0]} is there already: remove it or name another")
