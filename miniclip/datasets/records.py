"""How a source is read, and the checks that records of any form pass before anything starts."""

import json
import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm.auto import tqdm

from miniclip.datasets.remote import RemoteImage, RemoteRoot
from miniclip.datasets.sound_images import SoundImages
from miniclip.utils.bad_samples import BadSamples, CaptionFileError, raise_or_skip, short
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, ImageFile, open_image
from miniclip.utils.parallel import read_ahead
from miniclip.utils.remote import is_remote, normal

logger = logging.getLogger(__name__)
NO_FILE = "no such file"
MANY = 1000  # images whose check shows a progress bar, and is remembered
FIRST = 16  # of many images on a store, those that are read before the start
MISSING = {"nan", "none", "null", "na", "n/a", "#n/a", "<na>"}  # as pandas and others write an empty cell
Raw = list[tuple]  # (name in messages, record that is not checked yet, or InputError)


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read."""

    image_root: str | Path | None = None  # where image paths start; the source's own folder by default; A::B for two
    image_column: str | None = None  # names of columns, keys or JSON fields; guessed by default
    caption_column: str | None = None
    split: str | None = None  # the part to read of a source that has several, as SOURCE:SPLIT does; "train+val" for two
    first: int | None = None  # how many records to read from the beginning, as SOURCE[:N] does; by default all
    on_bad_sample: str = "stop"  # "stop": raise an error that names all bad samples; "skip": warn, and read the others
    bad_samples: BadSamples | None = None  # where skipped samples are listed
    allow_outside_image_root: bool = False  # image paths may lead out of their folder: .., absolute ones, links
    image_files: bool = True  # False: images are names alone, and their files need not exist
    check_images: bool = True  # decode all image files once, to find damaged ones before they stop a run
    check_handles: bool = False  # the same for images that are an ImageFile, in shards and tables

    @classmethod
    def from_args(cls, args, **more) -> "ReadOptions":
        """Returns the options that parsed arguments have under the same names or as `columns`, and `more`."""
        given = {field.name: vars(args).get(field.name) for field in fields(cls)} | more
        given["image_column"], given["caption_column"] = vars(args).get("columns") or (None, None)
        return cls(**{name: value for name, value in given.items() if value is not None})

    def report(self, source, what: str, problems: list[tuple[str, str]], left: int, prefix=None, *none_left):
        """Raises an error for bad samples or skips them (`raise_or_skip`), listed as those of `source` by default."""
        prefix = f"{source}: " if prefix is None else prefix
        raise_or_skip(source, what, problems, left, prefix, self.on_bad_sample, self.bad_samples, *none_left)


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark. Raises CaptionFileError."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise CaptionFileError(f"{path}: {NO_FILE}") from None
    except UnicodeDecodeError as error:
        what = "it is UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.object[error.start]:#x}"
        line = data.count(b"\n", 0, error.start) + 1
        raise CaptionFileError(f"{path}: not UTF-8 ({what}, in line {line}): save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CaptionFileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def parse_json(text: str, name=None):
    """Returns the value of a JSON text, an InputError for an object that repeats a name. Raises CaptionFileError."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        error = "nested too deeply"
    except ValueError as fault:
        error = fault if text.strip() else "it is empty"
    raise CaptionFileError(f"{name}: invalid JSON: {error}" if name else f"invalid JSON: {error}")


def _object(pairs: list[tuple]) -> dict | InputError:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
    return InputError(f"{short(twice)} occurs twice: remove one")


def check_records(path: Path, raw: Raw, options: ReadOptions) -> list[dict]:
    """Checks the records of any text form, of which some may have turned out to be an InputError."""
    root = image_root(path if path.is_dir() else options.image_root or path.parent, options.allow_outside_image_root)
    records, faults = {}, {}
    for index, (_, record) in enumerate(raw):
        try:
            if isinstance(record, InputError):
                raise record
            if not isinstance(record, dict) or not {"image", "caption"} <= record.keys():
                raise InputError(f"expected an object with image and caption, found {short(record)}")
            image = record["image"]
            if not isinstance(image, str) or not image:
                raise InputError(f"image is not a path: {short(image)}")
            file = root.file(image) if options.image_files else root.path(image)
            records[index] = {"image": file, "caption": check_captions(record["caption"], image)}
        except ValueError as error:
            faults[index] = str(error)
    if options.check_images:
        checked = dict(records)
        if not options.check_handles:  # those on a store are found when they are reached, as in shards
            distant = [index for index, record in records.items() if isinstance(record["image"], ImageFile)]
            checked = {index: records[index] for index in records.keys() - set(distant[FIRST:])}
        found = image_faults(list(checked.values()), path.name)
        faults |= {index: fault for index, fault in zip(checked, found) if fault}
    if sum(NO_FILE in fault for fault in faults.values()) == len(raw) > 1:
        hint = f"none of its {len(raw)} records has an image in {root.folder}: is --image_root right?"
        raise CaptionFileError(f"{path}: {hint} The first:\n  {raw[0][0]}: {faults[0]}")
    good = [record for index, record in records.items() if index not in faults]
    problems = [(raw[index][0], faults[index]) for index in sorted(faults)]
    options.report(path, f"{len(faults)} of {len(raw)} records cannot be used", problems, len(good))
    return good


def image_root(folder: str | Path, allow_outside: bool = False) -> "ImageRoot | RemoteRoot":
    """Returns the folder where image paths start, on this machine or on a store."""
    return RemoteRoot(str(folder), allow_outside) if is_remote(folder) else ImageRoot(folder, allow_outside)


class ImageRoot:
    """The folder where image paths start. It may be a link itself, but without `allow_outside` no path below it may
    lead out of it, by `..`, as an absolute path, or through a link."""

    def __init__(self, folder: str | Path, allow_outside: bool = False):
        self.folder, self.allow_outside = os.path.abspath(folder), allow_outside
        self.real = os.path.realpath(self.folder)
        self.inside = {}  # folder -> whether it lies in this one: each is resolved once, not for a million images
        self.leads_out = f"leads out of the image folder {self.folder} (--allow_outside_image_root allows it)"

    def path(self, image: str) -> str:
        """Returns the absolute path of an image that need not exist."""
        return image if is_remote(image) else os.path.abspath(os.path.join(self.folder, image))

    def file(self, image: str) -> str | ImageFile:
        """Returns the absolute path of an image. Raises InputError if it leads out, is missing or is not a file."""
        if is_remote(image):
            if not self.allow_outside:
                root = "/".join(image.split("/")[:3])
                fix = f"allow it with --image_root {root}, or any address with --allow_outside_image_root"
                raise InputError(f"{image[:60]!r}: an image on another store: {fix}")
            return RemoteImage(normal(image))
        if "\0" in image:
            raise InputError(f"{image[:60]!r}: a path cannot contain a NUL character")
        file = os.path.abspath(os.path.join(self.folder, image := as_stored(image, self.folder)))
        if not self.allow_outside and not is_within(file, self.folder):
            raise InputError(f"{image}: {self.leads_out}")
        try:
            file.encode()
            mode = os.lstat(file).st_mode
            if link := stat.S_ISLNK(mode):
                mode = os.stat(file).st_mode
        except UnicodeEncodeError:  # Arrow tables, which share the records between processes, cannot hold it
            raise InputError(f"{image!a}: the name is not valid Unicode: rename the file") from None
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{image!r}: {NO_FILE} in {self.folder}") from None
        except OSError as error:  # links in a ring, a name that is too long, a folder without permission
            raise InputError(f"{short(image)}: cannot be opened ({error.strerror})") from None
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise InputError(f"{image!r}: {kind}, not an image file")
        paths = [os.path.dirname(file), file] if link else [os.path.dirname(file)]
        for path in [] if self.allow_outside else paths:
            if path not in self.inside:
                self.inside[path] = is_within(os.path.realpath(path), self.real)
            if not self.inside[path]:
                raise InputError(f"{image}: a link {self.leads_out}")
        return file

    def walk(self, fault: Callable[[str, str], None]) -> Iterator[tuple[str, list[str]]]:
        """Yields the folders at any depth, relative to this one, and their files, except hidden ones. Follows links
        that stay inside, but enters no folder twice (a ring). Calls `fault(name, reason)` for what cannot be read."""

        def unread(error: OSError):
            fault(os.path.relpath(error.filename, self.folder), f"cannot be opened ({error.strerror})")

        seen = set()
        for folder, folders, files in os.walk(self.folder, followlinks=True, onerror=unread):
            real, here = os.path.realpath(folder), os.path.relpath(folder, self.folder)
            if real in seen or not self.allow_outside and not is_within(real, self.real):
                folders.clear()
                out = "a link out of the image folder: remove it, or pass --allow_outside_image_root"
                fault(here, "a second path to a folder that was already read: remove the link" if real in seen else out)
                continue
            seen.add(real)
            links = {name: os.path.islink(os.path.join(folder, name)) for name in folders if not name.startswith(".")}
            folders[:] = sorted(links, key=lambda name: (links[name], name))  # by its own name rather than by a link's
            yield here, sorted(name for name in files if not name.startswith("."))


def as_stored(image: str, folder: str | Path) -> str:
    """An image's path as its folder has it. In a path that the folder lacks, Windows' separator may stand for its own,
    and é for a letter and an accent, two characters, or these for é: Macs and other systems differ in that."""
    if ("\\" in image or not image.isascii()) and not os.path.lexists(os.path.join(folder, image)):
        image = image.replace("\\", "/")
        forms = (unicodedata.normalize(form, image) for form in ("NFC", "NFD"))
        return next((name for name in forms if os.path.lexists(os.path.join(folder, name))), image)
    return image


def is_within(path: str, folder: str) -> bool:
    """Returns whether an absolute path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def check_captions(captions, image) -> list[str]:
    """Returns the captions of an image as a list. Raises InputError, which names the image."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        raise InputError(f"{image}: caption is neither a string nor a list of strings: {short(captions)}")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{image}: caption {number} is not text: {short(caption)}")
        if caption.strip().lower() in MISSING:
            raise InputError(f"{image}: caption {number} is missing: {caption!r} stands for an empty cell")
        try:
            caption.encode()
        except UnicodeEncodeError:  # half an emoji: Arrow cannot hold it
            raise InputError(f"{image}: caption {number} is not valid Unicode: {caption[:60]!a}") from None
    return captions


def image_faults(records: Sequence[dict], name: str, num_workers: int | None = None) -> list[str | None]:
    """Returns what is wrong with each record's image, or None. For a thousand or more with a progress bar, and files
    that were found sound before are not read again."""

    def fault(index: int) -> str | None:
        try:
            open_image(records[index]["image"], scale=32)  # reads every byte all the same; `verify` passes half a JPEG
        except ImageError as error:  # also where a shard has lost the caption
            return str(error)

    n = len(records)
    sound = SoundImages([record["image"] for record in records]) if isinstance(records, list) and n >= MANY else None
    rows, faults = sound.unknown() if sound else range(n), [None] * n
    found = read_ahead(fault, rows, num_workers, 1000)
    for row, reason in zip(rows, tqdm(found, f"checking the images of {name}", len(rows), disable=n < MANY)):
        faults[row] = reason
    if sound and rows:
        sound.add([row for row in rows if faults[row] is None])
    return faults


def one_per_image(records: Sequence[dict], name) -> Sequence[dict]:
    """Returns, for evaluation, the records with those of the same image file merged, each caption once: a second copy
    in the gallery would count as a wrong answer to its own caption. Sources without image files stay as they are."""
    if not isinstance(records, list):
        return records
    captions = {}
    for record in records:
        captions.setdefault(record["image"], {}).update(dict.fromkeys(record["caption"]))
    joined = [{"image": image, "caption": list(texts)} for image, texts in captions.items()]
    if joined != records:
        dropped = sum(len(record["caption"]) for record in records) - sum(map(len, captions.values()))
        what = f"{len(records) - len(joined)} records that repeat an image and dropped {dropped} repeated captions"
        logger.warning("%s: merged %s: %d images are left", name, what, len(joined))
    return joined


def flatten_captions(records: Sequence[dict]) -> tuple[list[str], list[int]]:
    """Returns all captions in order, and the number of each one's record."""
    captions = [record["caption"] for record in records]
    return [text for texts in captions for text in texts], [i for i, texts in enumerate(captions) for _ in texts]
