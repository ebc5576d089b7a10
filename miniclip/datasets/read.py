"""Reading a source in any form (docs/datasets.md) to records {"image": path or ImageFile, "caption": [strings]}.

A::B stands for several sources, A:val for the split `val` of one, and A[:300] for its first 300 records."""

import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from miniclip.datasets.mixture import Mixture, parse_factors
from miniclip.datasets.records import ReadOptions, check_records, image_faults
from miniclip.datasets.remote import list_folder
from miniclip.datasets.shards import Shards, expand
from miniclip.datasets.splits import at_split, is_hub
from miniclip.datasets.tables import FILES, Table, is_saved, is_table, load_table
from miniclip.datasets.text_files import READERS, read_folder
from miniclip.utils.bad_samples import CaptionFileError
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256
from miniclip.utils.local_copy import local_copy
from miniclip.utils.remote import info, is_remote, list_files


def read_source(source: str, options: ReadOptions = ReadOptions(), *, factors: str | None = None,
                num_samples: int | None = None) -> Sequence[dict]:  # fmt: skip
    """Returns the records of a source in any form. Of several sources each may have its own image root (`A::B`);
    `factors` ("1::2.5") and `num_samples` make an epoch (`Mixture`). Raises InputError, for all sources together."""
    parts, sources, problems = split(source), [], []
    roots = split(options.image_root) if options.image_root else [None]
    if len(roots) not in (1, len(parts)):
        raise InputError(f"{source}: {len(roots)} image roots for {len(parts)} sources: give one, or one for each")
    for part, root in zip(parts, itertools.cycle(roots)):
        try:
            sources.append(_read_one(part, replace(options, image_root=root)))
        except InputError as error:
            problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else CaptionFileError("\n".join(map(str, problems)))
    if factors is None and num_samples is None:
        if all(isinstance(records, list) for records in sources):
            return list(itertools.chain(*sources))
        if len(sources) == 1:
            return sources[0]
    return Mixture(sources, parse_factors(factors, len(sources)), num_samples)


def read_captions(source: str | Path, image_root: str | Path | None = None, **options) -> Sequence[dict]:
    """Reads and checks captions in any form: `[{"image": "dogs/rex.jpg", "caption": ["a dog", "my dog Rex"]}, ...]`.

    Returns `[{"image": absolute path or ImageFile, "caption": [strings]}, ...]`. Image paths start at `image_root`, by
    default the source's own folder. `options`: other fields of ReadOptions. Raises InputError for a source that cannot
    be read, and one that names all bad records, with what is wrong with each."""
    return read_source(str(source), ReadOptions(image_root, **options))


def split(source: str | Path) -> list[str]:
    """Returns the sources in a specification, which `::` separates."""
    if not all(parts := [part.strip() for part in str(source).split("::")]):
        raise InputError(f"{source!r}: nothing on one side of a ::")
    return parts


def _read_one(source: str, options: ReadOptions) -> Sequence[dict]:
    if not is_hub(source) and (first := re.fullmatch(r"(.+)\[:(\d+)\]", source)):
        if not (n := int(first[2])):
            raise InputError(f"{source}: [:0] leaves no record")
        return _read_one(first[1], replace(options, first=min(n, options.first or n)))
    source, name = at_split(source)
    path, options = Path(source), replace(options, split=name or options.split)
    if is_remote(source) and not re.search(r"\.(tgz|tar(\.\w+)?)$", source):
        return _read_remote(source.rstrip("/"), options)
    if options.split and (path / options.split).is_dir() and not is_saved(path):
        path, options = path / options.split, replace(options, split=None)
        source = str(path)
    suffix = path.suffix.lower()
    table = suffix not in READERS and is_table(source)
    shards = sorted(map(str, path.glob("*.tar"))) if path.is_dir() else []
    if suffix in READERS or path.is_dir() and not table and not shards:
        return check_records(path, READERS.get(suffix, read_folder)(path, options)[: options.first], options)
    if suffix in (".tar", ".tgz") or re.search(r"\.tar\.\w+$", source) or shards:
        if options.split:
            raise InputError(f"{source}: shards have no splits: name the shards of {options.split!r}")
        records = Shards(shards or expand(source), options)
    elif table:
        dataset, part, strict = load_table(source, options.split)
        records = Table(dataset, source, replace(options, split=part), strict)
    else:
        missing = f"no such file or folder (a data set of the Hugging Face hub is hf:{source})"
        known = ", ".join((*READERS, ".tar", ".parquet", ".arrow", "a folder", "hf:NAME"))
        raise InputError(f"{source}: {f'unknown form of data; known are {known}' if path.exists() else missing}")
    records.rows = records.rows[: options.first]
    if options.check_handles:
        faults = image_faults(records, path.name)
        problems = [(f"sample {row}", fault) for row, fault in enumerate(faults) if fault]
        good = [row for row, fault in enumerate(faults) if not fault]
        options.report(source, f"{len(problems)} of {len(records)} images are damaged", problems, len(good))
        records.rows = records.rows[good]
    return records


def _read_remote(source: str, options: ReadOptions) -> Sequence[dict]:
    """Reads a source on a store, except shards, from a copy. Its image paths start at its place on the store."""
    suffix, names = PurePosixPath(source).suffix.lower(), []
    if suffix in FILES:
        copies = [str(local_copy(url))[: -len(suffix)] for url in expand(source)]
        local = f"{{{','.join(copies)}}}{suffix}"
    elif suffix in READERS:
        local = str(local_copy(source))
    else:
        names = [PurePosixPath(name).name for name in list_folder(source)]
        local = "" if {"dataset_info.json", "dataset_dict.json"}.isdisjoint(names) else str(local_copy(source))
        for kind in (".tar", *FILES) if not local else ():
            if any(name.lower().endswith(kind) for name in names):
                return _read_one(f"{source}/*{kind}", options)
        if not local:
            fix = "name a caption file, or pack the folder: miniclip convert_data FOLDER shards/{000..009}.tar"
            what = f"images with texts beside them are not read from a store: {fix}"
            raise InputError(f"{source}: {what if names else 'no such file or folder on the store'}")
    root = options.image_root or (source if names else source.rpartition("/")[0])
    try:
        records = _read_one(local, replace(options, image_root=root))
        if isinstance(records, Table):
            records.source = source
        return records
    except InputError as error:  # name what the user named
        raise type(error)(str(error).replace(local, source)) from None


def describe(records: Sequence[dict], tokenizer, most: int = 100_000) -> str:
    """Returns a line on the training data, of which it counts the captions of the first `most` images."""
    texts = [text for record in itertools.islice(records, most) for text in record["caption"]]
    room = tokenizer.context_length - 2
    # A token takes up a character of ASCII at least: short captions, nearly all, need no counting.
    long = (text for text in texts if len(text) >= room or not text.isascii())
    cut = sum(len(tokenizer.encode(text)) > room for text in long)
    of = f" (of the first {most:,} images)" if len(records) > most else ""
    line = f"{len(records)} images, {len(texts)} captions{of}, {cut} of them cut off at {room + 2} tokens"
    again = len(records) - len({record["image"] for record in records}) if isinstance(records, list) else 0
    return f"{line}; {again} records repeat the image of another: duplicates (--duplicates)" if again else line


def fingerprint(source: str, records: Sequence[dict] | None = None) -> dict:
    """Returns, for a run's metadata, the sha256 of a data set's files, or of the names and sizes of those in a folder
    or of shards, but hidden ones, and how many records and captions were taken from it."""
    found = {"files": [_digest(part) for part in split(source)]}  # wherever they lie
    if records is not None:
        found["records"] = len(records)
    if isinstance(records, list):
        found["captions"] = sum(len(record["caption"]) for record in records)
        images = (record["image"] for record in records if isinstance(record["image"], (str, Path)))
        found["image_bytes"] = sum(os.path.getsize(image) for image in images if os.path.isfile(image))
    return found


def _digest(source: str) -> str | None:
    source, _ = at_split(re.sub(r"\[:\d+\]$", "", source))  # of a part: the whole, and the number of records
    if is_remote(source):
        if Path(source).suffix.lower() in READERS:
            return sha256(local_copy(source))
        urls = [] if list_folder(source) else expand(source)
        sizes = {PurePosixPath(url).name: info(url)["size"] for url in urls}
        sizes |= {name: about["size"] for name, about in list_files(source).items()} if not urls else {}
        listing = "\n".join(f"{name} {sizes[name]}" for name in sorted(sizes))
        return f"names and sizes {hashlib.sha256(listing.encode()).hexdigest()}"
    path = Path(source)
    if path.is_file():
        size = path.stat().st_size
        return sha256(path) if size <= 1 << 30 else f"{size} bytes"  # to read more would take too long
    try:
        files = path.rglob("*") if path.is_dir() else map(Path, expand(source))
    except InputError:
        return None
    lines = (f"{os.path.relpath(file, path.parent)} {file.stat().st_size}" for file in sorted(files) if file.is_file())
    listing = "\n".join(line for line in lines if f"{os.sep}." not in os.sep + line)  # a hidden index comes and goes
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    return f"names and sizes {digest}" if listing else None
