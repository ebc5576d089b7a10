"""JSON as data sets are published (Karpathy's splits, COCO's lists, {"image": [captions]}) and as pandas writes it."""

from pathlib import Path

from miniclip.datasets.captions import CAPTION_KEYS, IMAGE_KEYS, captions_in
from miniclip.datasets.records import Raw
from miniclip.utils.bad_samples import CaptionFileError, short
from miniclip.utils.errors import InputError


def published_records(raw, path: Path, caption_key: str | None = None) -> Raw:
    """Returns the records of a JSON file, a list in most: (name in messages, record as published). The captions of COCO
    lie under `caption_key` in its annotations, by default the first of CAPTION_KEYS. Raises CaptionFileError."""
    if isinstance(raw, InputError):  # an object that repeats a name
        raise CaptionFileError(f"{path}: {raw}")
    if isinstance(raw, dict):
        images, annotations = raw.get("images"), raw.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return _coco(images, annotations, path, caption_key)
        lists = [value for value in (images, annotations, raw.get("data")) if isinstance(value, list)]
        if records := [value for value in lists if any(isinstance(record, dict) for record in value)]:
            raw = [_karpathy(record) for record in records[0]]
        elif any(raw.values()) and all(isinstance(value, (str, list, type(None))) for value in raw.values()):
            raw = [{"image": image, "caption": captions} for image, captions in raw.items()]
        elif raw.keys() & set(IMAGE_KEYS) and all(isinstance(value, dict) for value in raw.values()):
            rows = dict.fromkeys(row for column in raw.values() for row in column)  # DataFrame.to_json: by column
            raw = [{name: column.get(row) for name, column in raw.items()} for row in rows]
        elif all(isinstance(value, dict) for value in raw.values()):
            raw = [{"image": image} | record for image, record in raw.items()]
    if not isinstance(raw, list) or not raw:
        raise CaptionFileError(f"{path}: expected a list of records, found {short(raw)}")
    return [(f"record {number}", record) for number, record in enumerate(raw)]


def _karpathy(record):
    """Joins the folder and the name of an image: of two known columns only the first would be read."""
    if isinstance(record, dict) and {"filepath", "filename"} <= record.keys():
        folder = record.pop("filepath")
        record["filename"] = f"{folder}/{record['filename']}" if folder else record["filename"]
    return record


def _coco(images: list, annotations: list, path: Path, key: str | None) -> Raw:
    captions, rows, known = {}, [], set()
    keys = {key} if key else set(CAPTION_KEYS)
    if annotations and not any(isinstance(annotation, dict) and annotation.keys() & keys for annotation in annotations):
        where = f" under {key!r}" if key else ": take COCO's captions_*.json"
        raise CaptionFileError(f"{path}: its annotations have no captions{where}")
    for number, annotation in enumerate(annotations):
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), (int, str)):
            captions.setdefault(str(annotation["image_id"]), []).append((number, captions_in(annotation, key)))
        else:
            rows.append((f"annotation {number}", InputError(f"expected an image_id, found {short(annotation)}")))
    for number, image in enumerate(images):
        if isinstance(image, dict):
            identity = str(image.get("id")) if isinstance(image.get("id"), (int, str)) else ""
            known.add(identity)
            texts = [text for _, found in captions.get(identity, ()) for text in found]
            what = f"no annotation has its id: {short(image)}"
            image = image | {key or "caption": texts} if texts else InputError(what)
        rows.append((f"image {number}", image))
    for identity in captions.keys() - known:
        lost = InputError(f"there is no image with the id {identity}")
        rows += [(f"annotation {number}", lost) for number, _ in captions[identity]]
    return rows
