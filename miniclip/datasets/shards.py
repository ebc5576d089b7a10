"""WebDataset shards: tar files in which `000123.jpg` and `000123.txt` are one sample, read in any order.

An index of where every image and caption lies is kept beside the shards, and rebuilt when one of them changes."""

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from miniclip.datasets.captions import CAPTIONS, caption_kind, parse_caption
from miniclip.datasets.records import NO_FILE, ReadOptions
from miniclip.datasets.remote import expand_remote
from miniclip.utils.errors import InputError
from miniclip.utils.files import replacing, user_cache
from miniclip.utils.image_files import EXTENSIONS, ImageError, ImageFile
from miniclip.utils.parallel import read_ahead
from miniclip.utils.remote import StoreError, is_remote, open_remote, read_range, retrying, version

VERSION = 4  # of the index: raise it when old ones must be rebuilt
ROW = np.dtype([("shard", "<i4"), ("header", "<i8"), ("offset", "<i8"), ("size", "<i8"),
                ("text_offset", "<i8"), ("text_size", "<i8"), ("json", "?")])  # fmt: skip
COMPRESSED = "a compressed shard has no random access: decompress it (gunzip)"


def expand(pattern: str) -> list[str]:
    """Returns the paths or addresses that a pattern stands for, in order: `{000..123}` numbers, `{a,b}`
    alternatives, `*` and `?` files. Raises InputError for a glob that matches no file."""
    if not os.path.exists(pattern) and (found := re.search(r"\{([^{}]*)\}", pattern)):
        choices = found[1].split(",")
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
            first, last = numbers.groups()
            width = len(first) if first.startswith("0") or len(first) == len(last) else 0
            choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
        if not choices:
            raise InputError(f"{pattern}: {found[0]} counts down")
        return [path for c in choices for path in expand(f"{pattern[: found.start()]}{c}{pattern[found.end() :]}")]
    if is_remote(pattern):
        return expand_remote(pattern)
    if not glob.has_magic(pattern) or os.path.exists(pattern):
        return [pattern]
    if not (paths := sorted(glob.glob(pattern))):
        raise InputError(f"{pattern}: no file matches this pattern")
    return paths


def read_at(path: str, offset: int, size: int) -> bytes:
    """Reads bytes of a file, opened each time: a shuffled run would hardly meet an open shard again."""
    if is_remote(path):
        data = read_range(path, offset, offset + size)
    else:
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
        except (OSError, StoreError) as error:
            raise ImageError(f"{self}: cannot be read ({error})") from None

    def __str__(self) -> str:
        """Returns its shard and its name, which is looked up there: names of millions would fill the memory."""
        try:
            with open_remote(self.path, self.offset, 1024) if is_remote(self.path) else open(self.path, "rb") as file:
                file.seek(self.header)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    return f"{self.path}: {tar.next().name}"
        except (OSError, tarfile.TarError, AttributeError, StoreError):
            return f"{self.path}: byte {self.offset}"


class Shards(Sequence):
    """The samples of tar shards, in order; with a `caption_column` only JSON with that key counts as a caption. Missing
    shards and bad samples raise InputError or are skipped; compressed shards, and no sample at all, always raise it."""

    def __init__(self, paths: list[str], options: ReadOptions = ReadOptions()):
        paths = [path if is_remote(path) else os.path.abspath(path) for path in paths]
        self.caption_key = options.caption_column
        if packed := [path for path in paths if re.search(r"\.(tgz|tar\.\w+)$", path)]:
            raise InputError(f"{packed[0]}: {COMPRESSED}")
        source = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        states = dict(zip(paths, read_ahead(_state, paths, 16, len(paths))))
        missing = [(path, NO_FILE) for path, state in states.items() if state is None]
        self.paths = [path for path in paths if states[path]]
        what = f"{len(missing)} of {len(paths)} shards are missing"
        options.report(source, what, missing, len(self.paths), "", "no shards")
        self.rows, problems, self.texts = _index(self.paths, [states[path] for path in self.paths], self.caption_key)
        what = f"{len(problems)} problems in the shards"
        example = "a sample is 000.jpg with 000.txt or 000.json"
        options.report(source, what, problems, len(self.rows), "", f"no samples: {example}")
        if not len(self.rows):
            raise InputError(f"{source}: no samples in it: {example}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        shard, header, offset, size, text_offset, text_size, is_json = self.rows[index].item()
        image = ShardImage(self.paths[shard], header, offset, size)
        try:
            text = read_at(str(self.texts) if is_remote(image.path) else image.path, text_offset, text_size)
            caption = parse_caption(text, is_json, "", self.caption_key)
        except (OSError, InputError) as error:  # it was good when the index was built
            raise ImageError(f"{image}: its caption cannot be read ({error})") from None
        return {"image": image, "caption": caption}


def _state(path: str) -> tuple | None:
    """Returns the size of a shard and what tells that it changed; None if it is missing."""
    if is_remote(path):
        about = retrying(path, lambda fs, place: fs.info(place) if fs.exists(place) else {"type": None})
        return (about["size"], version(about)) if about["type"] == "file" else None
    return (os.path.getsize(path), os.stat(path).st_mtime_ns) if os.path.isfile(path) else None


def _index(paths: list[str], states: list[tuple], caption_key: str | None):
    """Returns the rows of all shards and their problems, from the index of an earlier run if it is up to date, and the
    file to which the captions of shards on a store were copied."""
    about = json.dumps([VERSION, caption_key, [(path, *state) for path, state in zip(paths, states)]])
    state = hashlib.sha256(about.encode()).hexdigest()
    name = f".miniclip-{hashlib.sha256(json.dumps([caption_key, paths]).encode()).hexdigest()[:16]}.npz"
    places = [Path(paths[0]).parent / name, user_cache() / name]  # the folder of the shards may be read-only
    places, texts = places[is_remote(paths[0]) :], user_cache() / f".miniclip-{state[:16]}.captions"
    for place in places:
        with suppress(Exception), np.load(place, allow_pickle=False) as saved:  # missing, or half of one
            if str(saved["state"]) == state and (texts.exists() or not is_remote(paths[0])):
                return saved["rows"], [tuple(json.loads(problem)) for problem in saved["problems"].tolist()], texts
    shards = [(number, path, size) for number, (path, (size, _)) in enumerate(zip(paths, states))]
    work = read_ahead(lambda shard: _index_shard(caption_key, *shard), shards, None, len(paths))  # mostly disk
    few = len(paths) < 100 and not is_remote(paths[0])
    parts = list(tqdm(work, "reading the shards' headers", len(paths), disable=few))
    rows, problems = np.concatenate([rows for rows, *_ in parts]), [fault for _, found, _ in parts for fault in found]
    if is_remote(paths[0]):  # each would be a request to the store
        captions = [text for *_, found in parts for text in found]
        rows["text_offset"] = np.cumsum([0, *map(len, captions)], dtype=np.int64)[:-1]
        texts.parent.mkdir(parents=True, exist_ok=True)
        with replacing(texts) as scratch:
            scratch.write_bytes(b"".join(captions))
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as scratch:
                np.savez(scratch, state=state, rows=rows, problems=np.array([*map(json.dumps, problems)], dtype=str))
            break
    return rows, problems, texts


def _index_shard(caption_key: str | None, number: int, path: str, end: int) -> tuple[np.ndarray, list, list[bytes]]:
    """Returns the rows of one shard of `end` bytes, its problems, and the rows' captions."""
    samples, rows, problems, texts, captions = {}, [], [], {}, []
    try:
        with open_remote(path, end) if is_remote(path) else open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise InputError(f"{path}: {COMPRESSED}")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # which would grow with each one
                    cut = member.isfile() and member.offset_data + member.size > end
                    fault = "the shard is cut off in the middle of it" if cut else _sort_in(samples, member)
                    if not cut and member.name.lower().endswith(CAPTIONS):  # here, where the data around it is at hand
                        file.seek(member.offset_data)
                        texts[member.offset_data] = file.read(member.size)
                    if fault:
                        problems.append((f"{path}: {member.name}", fault))
                    if cut:
                        break
                else:
                    file.seek(tar.offset)
                    rest = file.read(1 << 16)
                    if rest[:512] != bytes(512):  # tarfile stops silently where there is no end mark
                        problems.append((path, f"damaged or cut off at byte {tar.offset}: the rest is lost"))
                    elif any(rest):  # and at the first of several
                        fix = "was it joined by cat? Name its parts instead"
                        problems.append((path, f"there is more after its end at byte {tar.offset}: {fix}"))
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
            parse_caption(texts[text.offset_data], kind == "json", text.name, caption_key)
            rows.append(row)
            captions.append(texts[text.offset_data])
        except InputError as error:
            problems.append((path, str(error)))
    return np.array(rows, ROW), problems, captions


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
