"""Is a caption file fit to be used? All of it is checked before anything starts, all that is wrong is said at once."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from miniclip.config import InputError
from miniclip.transforms import ImageError, open_image

NO_FILE = "there is no such file"


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
        from miniclip.inference import read_ahead

        faults = read_ahead(image_fault, [record["image"] for _, record in records], None, 1000)
        progress = tqdm(faults, f"checking the images of {path.name}", len(records), disable=len(records) < 1000)
        problems |= {index: fault for (index, _), fault in zip(records, progress) if fault}
    good = [record for index, record in records if index not in problems]
    if problems:
        lines = [f"  {names[index]}: {problems[index]}" for index in sorted(problems)]
        report = "\n".join([f"{path}: {len(problems)} of {len(raw)} records cannot be used:", *lines])
        if on_bad != "skip" or not good:
            way_out = ", or go on without them by --bad_records skip" if good else "; no record would be left"
            if sum(NO_FILE in problem for problem in problems.values()) == len(raw) > 1:
                hint = f"of none of its {len(raw)} records is there an image in {root}: is another --image_root meant?"
                raise CaptionFileError(f"{path}: {hint} The first:\n{lines[0]}")
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
        raise ValueError(f"{image!r}: {NO_FILE} in {root}")
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
