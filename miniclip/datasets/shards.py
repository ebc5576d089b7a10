"""WebDataset shards: tar files in which `000123.jpg` and `000123.txt` are one sample, read in any order.

An index of where every image and caption lies is kept beside the shards, and rebuilt when one of them changes.
"""

import glob
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from miniclip.datasets.captions import caption_kind, parse_caption
from miniclip.datasets.records import NO_FILE, ReadOptions
from miniclip.utils.errors import InputError
from miniclip.utils.files import replacing, user_cache
from miniclip.utils.image_files import EXTENSIONS, ImageError, ImageFile

VERSION = 3  # of the index: raise it when old ones must be rebuilt
ROW = np.dtype([("shard", "<i4"), ("header", "<i8"), ("offset", "<i8"), ("size", "<i8"),
                ("text_offset", "<i8"), ("text_size", "<i8"), ("json", "?")])  # fmt: skip
COMPRESSED = "a compressed shard has no random access: decompress it (gunzip)"


def expand(pattern: str) -> list[str]:
    """Returns the paths that a pattern stands for, in order: `{000..123}` numbers, `{a,b}` alternatives, `*` and `?`
    files. Raises InputError for a glob that matches no file."""
    if found := re.search(r"\{([^{}]*)\}", pattern):
        choices = found[1].split(",")
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
            first, last = numbers.groups()
            width = len(first) if first.startswith("0") or len(first) == len(last) else 0
            choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
        if not choices:
            raise InputError(f"{pattern}: {found[0]} counts down")
        return [path for c in choices for path in expand(f"{pattern[: found.start()]}{c}{pattern[found.end() :]}")]
    if not glob.has_magic(pattern) or os.path.exists(pattern):
        return [pattern]
    if not (paths := sorted(glob.glob(pattern))):
        raise InputError(f"{pattern}: no file matches this pattern")
    return paths


def read_at(path: str, offset: int, size: int) -> bytes:
    """Reads bytes of a file, opened each time: a shuffled run would hardly meet an open shard again."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"it ends after {len(data)} of {size} bytes")
    return data


@dataclass(eq=False, slots=True)
class ShardImage(ImageFile):
    """An image in a shard: where its header and its content begin, in bytes, and the content's size."""

    path: str
    header: int
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            return read_at(self.path, self.offset, self.size)
        except OSError as error:
            raise ImageError(f"{self}: cannot be read ({error})") from None

    def __str__(self) -> str:
        """Returns its shard and its name, which is looked up there: names of millions would fill the memory."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.header)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    return f"{self.path}: {tar.next().name}"
        except (OSError, tarfile.TarError, AttributeError):
            return f"{self.path}: byte {self.offset}"


class Shards(Sequence):
    """The samples of tar shards, in order; with a `caption_column` only JSON with that key counts as a caption. Missing
    shards and bad samples raise InputError or are skipped; compressed shards, and no sample at all, always raise it."""

    def __init__(self, paths: list[str], options: ReadOptions = ReadOptions()):
        paths, self.caption_key = [os.path.abspath(path) for path in paths], options.caption_column
        if packed := [path for path in paths if re.search(r"\.(tgz|tar\.\w+)$", path)]:
            raise InputError(f"{packed[0]}: {COMPRESSED}")
        source = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        missing = [(path, NO_FILE) for path in paths if not os.path.isfile(path)]
        self.paths, what = [path for path in paths if os.path.isfile(path)], f"{len(missing)} of {len(paths)} shards"
        options.report(source, f"{what} are missing", missing, len(self.paths), "", "no shards")
        self.rows, problems = _index(self.paths, self.caption_key)
        what, example = f"{len(problems)} problems in the shards", "a sample is 000.jpg with 000.txt or 000.json"
        options.report(source, what, problems, len(self.rows), "", f"no samples: {example}")
        if not len(self.rows):
            raise InputError(f"{source}: no samples in it: {example}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        shard, header, offset, size, text_offset, text_size, is_json = self.rows[index].item()
        image = ShardImage(self.paths[shard], header, offset, size)
        try:
            caption = parse_caption(read_at(image.path, text_offset, text_size), is_json, "", self.caption_key)
        except (OSError, InputError) as error:  # it was good when the index was built
            raise ImageError(f"{image}: its caption cannot be read ({error})") from None
        return {"image": image, "caption": caption}


def _index(paths: list[str], caption_key: str | None) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Returns the rows of all shards and their problems, from the index of an earlier run if it is up to date."""
    stats = [os.stat(path) for path in paths]
    about = json.dumps([VERSION, caption_key, [(p, s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats)]])
    state = hashlib.sha256(about.encode()).hexdigest()
    name = f".miniclip-{hashlib.sha256(json.dumps([caption_key, paths]).encode()).hexdigest()[:16]}.npz"
    places = [Path(paths[0]).parent / name, user_cache() / name]  # the folder of the shards may be read-only
    for place in places:
        with suppress(Exception), np.load(place, allow_pickle=False) as saved:  # missing, or half of one
            if str(saved["state"]) == state:
                return saved["rows"], [tuple(json.loads(problem)) for problem in saved["problems"].tolist()]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # which mostly wait for the disk
        work = pool.map(partial(_index_shard, caption_key), itertools.count(), paths)
        parts = list(tqdm(work, "reading the shards' headers", len(paths), disable=len(paths) < 100))
    rows, problems = np.concatenate([rows for rows, _ in parts]), list(itertools.chain(*(found for _, found in parts)))
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as scratch:
                np.savez(scratch, state=state, rows=rows, problems=np.array([*map(json.dumps, problems)], dtype=str))
            break
    return rows, problems


def _index_shard(caption_key: str | None, number: int, path: str) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Returns the rows of one shard and its problems."""
    samples, rows, problems, end = {}, [], [], os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise InputError(f"{path}: {COMPRESSED}")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # which would grow with each one
                    cut = member.isfile() and member.offset_data + member.size > end
                    fault = "the shard is cut off in the middle of it" if cut else _sort_in(samples, member)
                    if fault:
                        problems.append((f"{path}: {member.name}", fault))
                    if cut:
                        break
                else:
                    file.seek(tar.offset)
                    if file.read(512) != bytes(512):  # tarfile stops silently where there is no end mark
                        problems.append((path, f"damaged or cut off at byte {tar.offset}: the rest is lost"))
    except (tarfile.TarError, OSError) as error:
        problems.append((path, f"damaged or cut off ({error}): the rest is lost"))
    for key, members in samples.items():
        image = next((members[kind] for kind in EXTENSIONS if kind in members), None)
        kind = caption_kind(members, caption_key)
        if image is None or kind is None:
            reason = f"no {'image' if image is None else 'caption'} in a known format among .{', .'.join(members)}"
            problems.append((f"{path}: {key}", reason))
            continue
        text = members[kind]
        row = number, image.offset, image.offset_data, image.size, text.offset_data, text.size, kind == "json"
        try:
            parse_caption(read_at(path, text.offset_data, text.size), kind == "json", text.name, caption_key)
            rows.append(row)
        except (InputError, OSError) as error:
            problems.append((path, str(error)))
    return np.array(rows, ROW), problems


def _sort_in(samples: dict[str, dict], member: tarfile.TarInfo) -> str | None:
    """Adds a member to its sample, {extension: member}. WebDataset's key of a sample is the name up to the first dot of
    its last part. Passes over hidden files (`._000.jpg` of a Mac) and `__notes__`. Returns what is wrong with it."""
    if not member.isfile():
        return None if member.isdir() else "not a file but a link or the like: pack the file itself"
    folder, _, name = member.name.rpartition("/")
    key, _, extension = name.partition(".")
    if key and not key.startswith("__"):
        members = samples.setdefault(f"{folder}/{key}" if folder else key, {})
        kind = extension.lower().rpartition(".")[2]
        if members.setdefault(kind, member) is not member:
            return f"a second .{kind} of its sample; the first is used"


def add_sample(tar: tarfile.TarFile, key: str, image: bytes, kind: str, captions: list[str]):
    """Packs a sample into a shard, `kind` being the image's extension: one caption as a .txt, several as a .json."""
    single = len(captions) == 1 and not re.search(r"^\s|\s$|[\r\n]|^[\[(]", captions[0])  # read back as it is
    text = captions[0] if single else json.dumps({"caption": captions}, ensure_ascii=False)
    for name, data in ((f"{key}.{kind}", image), (f"{key}.{'txt' if single else 'json'}", text.encode())):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
