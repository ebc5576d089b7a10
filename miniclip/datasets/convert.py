"""Conversion of a data set to another form: `python -m miniclip convert_data FROM TO`."""

import csv
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm.auto import tqdm

from miniclip.datasets.captions import as_cell
from miniclip.datasets.records import ReadOptions
from miniclip.datasets.shards import add_sample, expand
from miniclip.utils.errors import InputError
from miniclip.utils.files import replacing
from miniclip.utils.image_files import ImageError, ImageFile, identify

logger = logging.getLogger(__name__)


def convert(source: Sequence[dict], target: str, samples_per_shard: int = 10_000,
            options: ReadOptions = ReadOptions(on_bad_sample="skip")) -> int:  # fmt: skip
    """Writes records to a .json, .jsonl, .csv or .tsv file, or to shards. Returns the number of records written.

    Shards (`out/{000000..000009}.tar`: as many as are named, filled evenly; `out/000000.tar`: numbered from there,
    `samples_per_shard` each) hold copies of the images. The other forms name image files, relative to the target's
    folder if below it; an ImageFile is written into a folder `<target>_images`. The target appears when it is complete.
    Raises InputError for bad images, unless `options` skip them, for a target that exists, and for an unknown form."""
    suffix = Path(target).suffix.lower()
    if suffix == ".tar":
        return _to_shards(source, target, samples_per_shard, options)
    if suffix in (".json", ".jsonl", ".csv", ".tsv"):
        return _to_file(source, Path(target), options)
    raise InputError(f"{target}: expected .json, .jsonl, .csv, .tsv or .tar")


def _to_shards(source: Sequence[dict], target: str, samples_per_shard: int, options: ReadOptions) -> int:
    paths, n = [Path(path) for path in expand(target)], len(source)
    if len(paths) > 1:
        ends = [n * (i + 1) // len(paths) for i in range(len(paths))]
    else:
        digits = re.search(r"(?:^|[-_])(\d+)$", paths[0].stem)  # 000, shard-000: not coco2017
        many = -(-n // samples_per_shard)
        if digits:
            first, width, before = int(digits[1]), len(digits[1]), paths[0].stem[: digits.start(1)]
            paths = [paths[0].with_name(f"{before}{first + i:0{width}d}.tar") for i in range(many)]
        elif many > 1:
            raise InputError(f"{target}: {many} shards of {samples_per_shard} need a number in their name: 000000.tar")
        ends = [min(n, samples_per_shard * (i + 1)) for i in range(len(paths))]
    _prepare(*paths)
    width = max(6, len(str(n)))
    rows = iter(tqdm(range(n), "packing"))
    faults = []
    with ExitStack() as stack:  # all shards or none
        for path, start, end in zip(paths, [0, *ends], ends):
            with tarfile.open(stack.enter_context(replacing(path)), "w") as tar:
                for index, record, data, kind in _readable(source, islice(rows, end - start), faults):
                    add_sample(tar, f"{index:0{width}d}", data, kind, record["caption"])
        options.report(target, f"{len(faults)} of {n} images cannot be used", faults, n - len(faults), "")
    return n - len(faults)


def _to_file(source: Sequence[dict], target: Path, options: ReadOptions) -> int:
    images, suffix, n, faults = target.with_name(f"{target.stem}_images"), target.suffix.lower(), len(source), []
    files = [record["image"] for record in source if not isinstance(record["image"], ImageFile)]
    own = len(files) < n
    _prepare(target, *[images] * own)
    base, width, records = Path(os.path.abspath(target.parent)), max(6, len(str(n))), []
    outside = any(not Path(file).is_relative_to(base) for file in files)
    if outside and own:
        raise InputError(f"{target}: some images are not files, others lie outside {base}: convert them separately")
    with replacing(target) as scratch, TemporaryDirectory(".tmp", ".", target.parent) as folder:
        (folder := Path(folder, images.name)).mkdir()  # with the usual permissions, unlike its parent
        for index, record, data, kind in _readable(source, tqdm(range(n), "writing"), faults, False):
            file = Path(f"{images.name}/{index:0{width}d}.{kind}" if data else record["image"])
            if data:
                (folder / file.name).write_bytes(data)
            elif not outside:
                file = file.relative_to(base)
            records.append({"image": str(file) if outside else file.as_posix(), "caption": record["caption"]})
        options.report(target, f"{len(faults)} of {n} images cannot be used", faults, len(records), "")
        with open(scratch, "w", encoding="utf-8", newline="") as file:
            if suffix == ".json":
                json.dump(records, file, ensure_ascii=False, indent=1)
            elif suffix == ".jsonl":
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            else:
                table = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\r\n")
                table.writerow(["filepath", "title"])  # OpenCLIP's names
                table.writerows((record["image"], as_cell(text)) for record in records for text in record["caption"])
        if own:
            os.rename(folder, images)
    if outside:
        logger.warning("%s: the images lie outside %s: read it with --image_root /", target, base)
    return len(records)


def _readable(source: Sequence[dict], rows: Iterable[int], faults: list, read_files: bool = True) -> Iterator:
    """Yields (row, record, the image's bytes and extension: None for files unless `read_files`), or adds a fault."""
    for row in rows:
        record = data = kind = None
        try:
            record = source[row]
            image = record["image"]
            if read_files or isinstance(image, ImageFile):
                data = image.read() if isinstance(image, ImageFile) else Path(image).read_bytes()
                try:
                    kind = identify(io.BytesIO(data), str(image)).format.lower()
                except ImageError:
                    raise
                except Exception as error:
                    raise ImageError(f"not an image ({error})") from None
                kind = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2", "heif": "heic"}.get(kind, kind)
        except (ImageError, OSError) as error:
            name = str(record["image"]) if record else f"sample {row}"
            faults.append((name, str(error).removeprefix(f"{name}: ")))
        else:
            yield row, record, data, kind


def _prepare(*paths: Path):
    for path in paths:
        if path.exists():
            raise InputError(f"{path} already exists: remove it or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
