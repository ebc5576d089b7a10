"""How are pairs read from WebDataset shards?

A shard is a plain tar file; `000123.jpg` and `000123.txt` in it are one sample. Plain tar files can be read at any
place: so all headers are gone through once, and what is kept is an index of where each image and caption lies. From
then on the shards are a sequence like any other, and shuffling, workers, several processes, resuming and evaluation
are those of a caption file. The index is kept beside the shards and made anew when one of them changes.
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
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from miniclip.datasets.records import check_captions, parse_json
from miniclip.utils.bad_samples import BadSamples, leave_out
from miniclip.utils.errors import InputError
from miniclip.utils.files import replacing, scratch_path, user_cache
from miniclip.utils.image_files import ImageError

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2", "ppm", "ico", "tga")
CAPTIONS = ("txt", "caption", "json")  # the first of them that a sample has is taken
CAPTION_KEYS = ("caption", "captions", "text", "texts", "title", "sentences", "sentence", "raw", "description")
VERSION = 2  # of the index, to be raised when it is to be made anew
ROW = np.dtype([("shard", "<i4"), ("header", "<i8"), ("offset", "<i8"), ("size", "<i8"),
                ("text_offset", "<i8"), ("text_size", "<i8"), ("json", "?")])  # fmt: skip


def expand(pattern: str) -> list[str]:
    """The paths that a pattern stands for, in order: `{000..123}` numbers, `{a,b}` alternatives, `*` and `?` files.

    Raises InputError for a glob that no file fits.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found:
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
        if numbers:
            first, last = numbers.groups()
            width = len(first) if first.startswith("0") or len(first) == len(last) else 0
            choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
            if not choices:
                raise InputError(f"{pattern}: {found[0]} counts down")
        else:
            choices = found[1].split(",")
        start, end = found.span()
        return [path for choice in choices for path in expand(pattern[:start] + choice + pattern[end:])]
    if not glob.has_magic(pattern) or os.path.exists(pattern):
        return [pattern]
    if not (paths := sorted(glob.glob(pattern))):
        raise InputError(f"{pattern}: no file fits this pattern")
    return paths


def captions_in(value, key: str | None = None, depth: int = 0):
    """The captions in what a caption file or column holds: a string, a list, an object that has them under `key`, or
    else under one of CAPTION_KEYS, or a list of such. Gives a list of whatever is there, for `check_captions`."""
    if isinstance(value, dict):
        value = next((value[known] for known in ([key] if key else CAPTION_KEYS) if known in value), None)
    if not isinstance(value, list) or depth > 20:  # so deep there is none, and at 300 the stack is full
        return [value]
    nested = (captions_in(part, key, depth + 1) if isinstance(part, (dict, list)) else [part] for part in value)
    return [caption for captions in nested for caption in captions]


def parse_caption(data: bytes, is_json: bool, name: str, key: str | None = None) -> list[str]:
    """The captions in a file beside an image: a text is one caption, and JSON has them under `key` if that is given.
    InputError says what is wrong with it."""
    try:
        text = data.decode("utf-8-sig")
        return check_captions(captions_in(parse_json(text, name), key) if is_json else [text.strip()], name)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: the caption is no UTF-8 ({error})") from None


def read_at(path: str, offset: int, size: int) -> bytes:
    """Bytes of a file. It is opened anew each time: a shuffled run leaps from shard to shard, so that a file kept open
    would hardly be met again, and nothing is shared between threads or processes."""
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset) if hasattr(os, "pread") else _seek(file, offset, size)
    if len(data) < size:
        raise OSError(f"it ends after {len(data)} of {size} bytes")
    return data


def _seek(file, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


class ShardImage:
    """An image within a shard. `read` gives its bytes, `str` its name."""

    __slots__ = ("path", "header", "offset", "size")

    def __init__(self, path: str, header: int, offset: int, size: int):
        self.path, self.header, self.offset, self.size = path, header, offset, size

    def read(self) -> bytes:
        """The image file as it was packed. Raises ImageError."""
        try:
            return read_at(self.path, self.offset, self.size)
        except OSError as error:
            raise ImageError(f"{self}: cannot be read ({error})") from None

    @property
    def name(self) -> str:
        """Its name in the shard, which is looked up there: names of millions would fill the memory."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.header)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    return tar.next().name
        except (OSError, tarfile.TarError, AttributeError):
            return f"byte {self.offset}"

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"


class Shards(Sequence):
    """The samples of tar shards, in order: `[i]` is {"image": ShardImage, "caption": [strings]}.

    `paths` are the shards; with a `caption_key` only JSON with that key counts as caption. What cannot be used in them
    is in `problems`, (name, reason) each; with on_bad="skip" it is left out, named in a warning, and listed. Otherwise
    it raises InputError, as does a shard that is missing or compressed, and where nothing can be used at all.
    """

    def __init__(
        self, paths: list[str], caption_key: str | None = None, on_bad: str = "stop",
        bad_samples: BadSamples | None = None,
    ):  # fmt: skip
        self.paths = [os.path.abspath(path) for path in paths]
        for path in self.paths:
            if re.search(r"\.(tgz|tar\.\w+)$", path):
                raise InputError(f"{path}: a compressed shard cannot be read at any place: decompress it (gunzip)")
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing:
            listed = "\n  ".join(missing[:10] + ["..."] * (len(missing) > 10))
            raise InputError(f"{len(missing)} of {len(self.paths)} shards are not there:\n  {listed}")
        self.caption_key = caption_key
        self.rows, self.problems = _index(self.paths, caption_key)
        what = f"{self.paths[0]}{f' and {len(self.paths) - 1} more' if len(self.paths) > 1 else ''}"
        said, one = f"{len(self.problems)} things in the shards cannot be used", "000.jpg and 000.txt or 000.json, say"
        left = len(self.rows)
        leave_out(what, said, self.problems, left, "", on_bad, bad_samples, f"no sample would be left: one is {one}")
        if not left:
            raise InputError(f"{what}: there is no sample in it: one is {one}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        shard, header, offset, size, text_offset, text_size, is_json = self.rows[index].item()
        image = ShardImage(self.paths[shard], header, offset, size)
        try:
            caption = parse_caption(read_at(image.path, text_offset, text_size), is_json, "", self.caption_key)
        except (OSError, InputError) as error:  # it was sound when the index was made
            raise ImageError(f"{image}: its caption cannot be read ({error})") from None
        return {"image": image, "caption": caption}


def _index(paths: list[str], caption_key: str | None) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The rows of all shards and what is wrong with them, from the file where an earlier run left them if it fits."""
    stats = [os.stat(path) for path in paths]
    about = json.dumps([VERSION, caption_key, [(p, s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats)]])
    state = hashlib.sha256(about.encode()).hexdigest()
    name = f".miniclip-{hashlib.sha256(json.dumps([caption_key, paths]).encode()).hexdigest()[:16]}.npz"
    home = user_cache()
    places = [Path(paths[0]).parent / name, home / name]
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as saved:
                if str(saved["state"]) == state:
                    return saved["rows"], [tuple(json.loads(problem)) for problem in saved["problems"].tolist()]
        except Exception:  # none there, or half of one: it is made anew
            continue
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # they mostly wait for the disk
        work = pool.map(partial(_index_shard, caption_key), itertools.count(), paths)
        parts = list(tqdm(work, "reading the shards' headers", len(paths), disable=len(paths) < 100))
    rows = np.concatenate([part for part, _ in parts]) if parts else np.empty(0, ROW)
    problems = [problem for _, found in parts for problem in found]
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as scratch:
                np.savez(scratch, state=state, rows=rows, problems=np.array([*map(json.dumps, problems)], dtype=str))
            break
        except OSError:  # a folder that must not be written to
            continue
    return rows, problems


def _index_shard(caption_key: str | None, number: int, path: str) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The samples of one shard, and what is wrong with it."""
    samples, problems = {}, []  # key -> {extension: member}
    end = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise InputError(f"{path}: a compressed shard cannot be read at any place: decompress it (gunzip)")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # which it would keep all of
                    if member.isfile() and member.offset_data + member.size > end:
                        problems.append((f"{path}: {member.name}", "the shard is cut off within it"))
                        break
                    if member.isfile():
                        _sort_in(samples, problems, path, member)
                    elif not member.isdir():
                        why = "no file but a link or the like; pack the file itself"
                        problems.append((f"{path}: {member.name}", why))
                else:
                    file.seek(tar.offset)
                    if file.read(512) != bytes(512):  # at no end mark tarfile stops without a word
                        problems.append((path, f"damaged or cut off at byte {tar.offset}: what follows is lost"))
    except (tarfile.TarError, OSError) as error:
        problems.append((path, f"damaged or cut off ({error}): what follows is lost"))
    rows = []
    for key, members in samples.items():
        image = next((members[kind] for kind in IMAGES if kind in members), None)
        kind = next((kind for kind in (["json"] if caption_key else CAPTIONS) if kind in members), None)
        if image is None or kind is None:
            lacks = "no image" if image is None else "no caption"
            listed = ", ".join(f".{kind}" for kind in members)
            problems.append((f"{path}: {key}", f"{lacks} that is known among {listed}"))
            continue
        text = members[kind]
        try:
            parse_caption(read_at(path, text.offset_data, text.size), kind == "json", text.name, caption_key)
        except (InputError, OSError) as error:
            problems.append((path, str(error)))
            continue
        rows.append((number, image.offset, image.offset_data, image.size, text.offset_data, text.size, kind == "json"))
    return np.array(rows, ROW), problems


def _sort_in(samples: dict, problems: list[tuple[str, str]], path: str, member: tarfile.TarInfo):
    """Puts a member to its sample: WebDataset's rule is that the name up to the first dot of its last part is the key.
    Hidden files (`._000.jpg` of a Mac) and WebDataset's `__notes__` belong to none."""
    folder, _, name = member.name.rpartition("/")
    key, _, extension = name.partition(".")
    if not key or key.startswith("__"):
        return
    members = samples.setdefault(f"{folder}/{key}" if folder else key, {})
    kind = extension.lower().rpartition(".")[2]
    if kind in members:
        problems.append((f"{path}: {member.name}", f"a second .{kind} of its sample; the first is used"))
    members.setdefault(kind, member)


class ShardWriter:
    """Packs samples into a tar shard: into `scratch`, which who uses it renames to `path` when all is well."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = scratch_path(self.path)
        self.tar = tarfile.open(self.scratch, "w", format=tarfile.PAX_FORMAT)

    def add(self, key: str, image: bytes, kind: str, captions: list[str]):
        """One sample. `kind` is the image's extension; one caption becomes a .txt, several a .json."""
        single = len(captions) == 1 and captions[0] == captions[0].strip()
        text = captions[0] if single else json.dumps({"caption": captions}, ensure_ascii=False)
        for name, data in ((f"{key}.{kind}", image), (f"{key}.{'txt' if single else 'json'}", text.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tar.close()
