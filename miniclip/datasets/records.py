"""Is a caption file fit to be used? All of it is checked before anything starts, all that is wrong is said at once."""

import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from miniclip.utils.bad_samples import BadSamples, CaptionFileError, leave_out, short
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, open_image

logger = logging.getLogger(__name__)
NO_FILE = "there is no such file"


def read_captions(
    path: str | Path,
    image_root: str | Path | None = None,
    check_images: bool = True,
    on_bad: str = "stop",
    allow_outside: bool = False,
    bad_samples: BadSamples | None = None,
) -> list[dict]:
    """Reads and checks a caption file: `[{"image": "dogs\\\\rex.jpg", "caption": ["a dog", "my dog Rex"]}, ...]`.

    Gives `[{"image": absolute path, "caption": [strings]}, ...]`. Image paths start at `image_root` (the file's own
    folder unless given) and may not leave it, by links neither, unless `allow_outside` says so; either separator will
    do; a caption may be one string. `check_images` decodes every image once, to find damaged ones before they stop a
    run. Raises CaptionFileError with the number, the image and the fault of all bad records together; with
    on_bad="skip" they are left out, with a warning, and listed in `bad_samples`.
    """
    path = Path(path)
    raw = parse_json(read_text(path), path)
    if not isinstance(raw, list) or not raw:
        raise CaptionFileError(f"{path}: expected a list of records, found {short(raw)}")
    root = ImageRoot(image_root or path.parent, allow_outside)
    return check_records(path, raw, root, check_images, on_bad, bad_samples=bad_samples)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with a byte order mark or without. Raises CaptionFileError."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise CaptionFileError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        what = "it is UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.object[error.start]:#x}"
        line = data.count(b"\n", 0, error.start) + 1
        raise CaptionFileError(f"{path}: no UTF-8 ({what}, in line {line}): save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise CaptionFileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def parse_json(text: str, name=None):
    """What a JSON text holds. An object with a name that occurs twice, of which json would take the last in silence,
    becomes an InputError in its place. Raises CaptionFileError, which begins with `name` if that is given."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        error = "nested too deeply"
    except ValueError as fault:
        error = fault if text.strip() else "there is nothing in it"
    raise CaptionFileError(f"{name}: no JSON: {error}" if name else f"no JSON: {error}")


def _object(pairs: list[tuple]):
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return InputError(f"{short(twice)} occurs twice in it: leave one of them out")


def check_records(
    path, raw: list, root, check_images: bool = True, on_bad: str = "stop", names=None, bad_samples=None
) -> list[dict]:
    """Checks raw records, of whatever file they come, as `read_captions` says. `root` is a folder or an ImageRoot. An
    InputError in the place of a record is reported like any other fault; `names` has what to call each (record 0,
    record 1, ... unless given)."""
    path, root = Path(path), root if isinstance(root, ImageRoot) else ImageRoot(root)
    names = names or [f"record {index}" for index in range(len(raw))]
    records, problems = [], {}
    for index, record in enumerate(raw):
        try:
            records.append((index, _check_record(record, root)))
        except ValueError as error:
            problems[index] = str(error)
    if check_images:
        from miniclip.utils.parallel import read_ahead

        faults = read_ahead(image_fault, [record["image"] for _, record in records], None, 1000)
        progress = tqdm(faults, f"checking the images of {path.name}", len(records), disable=len(records) < 1000)
        problems |= {index: fault for (index, _), fault in zip(records, progress) if fault}
    good = [record for index, record in records if index not in problems]
    if sum(NO_FILE in problem for problem in problems.values()) == len(raw) > 1:
        hint = f"of none of its {len(raw)} records is there an image in {root.folder}: is another --image_root meant?"
        raise CaptionFileError(f"{path}: {hint} The first:\n  {names[0]}: {problems[0]}")
    listed = [(names[index], problems[index]) for index in sorted(problems)]
    what = f"{len(problems)} of {len(raw)} records cannot be used"
    leave_out(path, what, listed, len(good), f"{path}: ", on_bad, bad_samples)
    return good


class ImageRoot:
    """The folder that image paths start from, which may be a link itself. Without `allow_outside` nothing below it may
    lead out of it: no `..`, no absolute path, no link."""

    def __init__(self, folder: str | Path, allow_outside: bool = False):
        self.folder, self.allow_outside = os.path.abspath(folder), allow_outside
        self.real = os.path.realpath(self.folder)
        self.inside = {}  # folder -> whether it lies in this one: each is resolved once, not for a million images

    def file(self, image: str) -> str:
        """The absolute path of an image. Raises InputError for one that leads out, is not there or is no file."""
        if "\0" in image:
            raise InputError(f"{image[:60]!r}: a path cannot hold a NUL character")
        if "\\" in image and not os.path.lexists(os.path.join(self.folder, image)):  # Windows' separator
            image = image.replace("\\", "/")
        file = os.path.abspath(os.path.join(self.folder, image))
        if not self.allow_outside and not is_within(file, self.folder):
            raise InputError(self._leads_out(image))
        try:
            file.encode()
            mode = os.lstat(file).st_mode
            if link := stat.S_ISLNK(mode):
                mode = os.stat(file).st_mode
        except UnicodeEncodeError:  # Arrow tables, which share the records between processes, cannot hold it
            raise InputError(f"{image!a}: the name is no valid Unicode: rename the file") from None
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{image!r}: {NO_FILE} in {self.folder}") from None
        except OSError as error:  # links in a ring, a name that is too long, a folder that must not be read
            raise InputError(f"{short(image)}: cannot be opened ({error.strerror})") from None
        if not stat.S_ISREG(mode):
            raise InputError(f"{image!r}: {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}, no image file")
        if not self.allow_outside and not (self._inside(os.path.dirname(file)) and (not link or self._inside(file))):
            raise InputError(self._leads_out(image, "a link "))
        return file

    def walk(self, fault: Callable[[str, str], None]) -> Iterator[tuple[str, list[str]]]:
        """The folders in it at any depth, relative to it, each with the names of its files; neither those whose names
        begin with a dot. Links are followed that stay in the folder, and none to a folder that was read already: they
        may go round in a ring. What cannot be read is told by `fault(name, reason)`."""

        def unread(error: OSError):
            fault(os.path.relpath(error.filename, self.folder), f"cannot be opened ({error.strerror})")

        seen = set()
        for folder, folders, files in os.walk(self.folder, followlinks=True, onerror=unread):
            real, here = os.path.realpath(folder), os.path.relpath(folder, self.folder)
            if real in seen or not self.allow_outside and not is_within(real, self.real):
                folders.clear()
                why = "a second way to a folder that is read already"
                why = why if real in seen else "a link out of the image folder"
                fault(here, f"{why}: remove the link" + " or --allow_outside_image_root" * (real not in seen))
                continue
            seen.add(real)
            links = {name: os.path.islink(os.path.join(folder, name)) for name in folders if not name.startswith(".")}
            folders[:] = sorted(links, key=lambda name: (links[name], name))  # by its own name rather than by a link's
            yield here, sorted(name for name in files if not name.startswith("."))

    def _inside(self, path: str) -> bool:
        if path not in self.inside:
            self.inside[path] = is_within(os.path.realpath(path), self.real)
        return self.inside[path]

    def _leads_out(self, image: str, what: str = "") -> str:
        return f"{image}: {what}leads out of the image folder {self.folder} (--allow_outside_image_root allows it)"


def is_within(path: str, folder: str) -> bool:
    """Whether an absolute path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _check_record(record, root: ImageRoot) -> dict:
    """One record in the form that the rest relies on; InputError says what is wrong with it."""
    if isinstance(record, InputError):
        raise record
    if not isinstance(record, dict) or not {"image", "caption"} <= record.keys():
        raise InputError(f"expected an object with image and caption, found {short(record)}")
    image, captions = record["image"], record["caption"]
    if not isinstance(image, str) or not image:
        raise InputError(f"image is no path: {short(image)}")
    return {"image": root.file(image), "caption": check_captions(captions, image)}


def check_captions(captions, image) -> list[str]:
    """The captions of an image as a list; InputError, naming the image, says what is wrong with them."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        raise InputError(f"{image}: caption is neither a string nor a list of some: {short(captions)}")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{image}: caption {number} is no text: {short(caption)}")
        try:
            caption.encode()
        except UnicodeEncodeError:  # half an emoji: Arrow cannot hold it
            raise InputError(f"{image}: caption {number} is no valid Unicode: {caption[:60]!a}") from None
    return captions


def image_fault(path) -> str | None:
    """What is wrong with a picture, if anything is."""
    try:
        open_image(path, scale=32)  # reads every byte all the same; `verify` would pass half a JPEG
    except ImageError as error:
        return str(error)


def one_per_image(records: Sequence[dict], name) -> Sequence[dict]:
    """For evaluation: the records of one image file joined to one, each of its captions once, since an image that the
    gallery has twice would be a wrong answer to its own caption. How many there were is said. Sources without image
    files as they are."""
    if not isinstance(records, list):
        return records
    captions = {}
    for record in records:
        captions.setdefault(record["image"], {}).update(dict.fromkeys(record["caption"]))
    joined = [{"image": image, "caption": list(texts)} for image, texts in captions.items()]
    dropped = sum(len(record["caption"]) for record in records) - sum(map(len, captions.values()))
    if joined != records:
        logger.warning(
            "%s: %d records of images that others have too were joined to those, %d captions that an image had twice"
            " left out: %d images", name, len(records) - len(joined), dropped, len(joined),
        )  # fmt: skip
    return joined


def flatten_captions(records: Sequence[dict]) -> tuple[list[str], list[int]]:
    """All captions in order, and the number of the record that each belongs to."""
    captions = [record["caption"] for record in records]
    return [text for texts in captions for text in texts], [i for i, texts in enumerate(captions) for _ in texts]
