"""Embeddings made elsewhere: found under their usual names, and read without running any code in their files.

A folder holds one array for the images and one for the texts: `image.npy`, `text_embeds.npy`, `image_features.pt`, or
the parts that clip-retrieval writes, `img_emb/img_emb_0.npy`. One .npz, .safetensors or .pt may also hold both."""

import math
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from miniclip.datasets.records import one_per_image
from miniclip.utils.errors import InputError, shorten
from miniclip.utils.files import check_manifest

KINDS = {"image": "image|img|vision|visual|picture|photo", "text": "text|txt|caption|sentence|query"}
WORDS = r"(?:emb|embed|embedding|feat|feature|vec|vector|encoding)s?"  # that may follow the kind
SPLITS = "(train|val|valid|validation|dev|test|eval)"  # and these
BOTH = (".npz", ".safetensors", ".pt", ".pth")  # files that can hold several arrays
NUMPY = "save it as plain numbers: np.save(path, embeddings.astype(np.float32))"
NAMES = "image.npy and text.npy (or image_embeds, text_features, img_emb/img_emb_0, ..; .npy, .npz, .safetensors, .pt)"
Features = tuple[np.ndarray, np.ndarray, list[dict]]


def is_kind(name: str, kind: str) -> bool:
    """Whether a file without its ending, or a key, is called as embeddings of this kind usually are."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return bool(re.fullmatch(rf"(.*[_.-])?({KINDS[kind]})s?([_.-]?{WORDS})?([_.-]{SPLITS})?([_.-]?\d+)?", name))


def find_features(path: str | Path) -> dict[str, list[Path]]:
    """Returns the files of the images and of the texts: {"image": [paths], "text": [paths]}, several for an array in
    parts, and twice the same for a file that holds both. Raises InputError where they are missing or ambiguous."""
    path, found = Path(path), {}
    if path.is_file():
        return dict.fromkeys(KINDS, [path])
    files = [file for file in sorted(path.glob("*")) if file.is_file()]
    usable = [file for file in files if file.suffix.lower() in (".npy", *BOTH)]
    for kind in KINDS:
        inner = [file for part in sorted(path.glob("*/")) if is_kind(part.name, kind) for file in part.glob("*.npy")]
        named = [file for file in usable + inner if is_kind(file.stem, kind)]
        found[kind] = [file for file in named if file.name == f"{kind}.npy"] or _parts(named)
    if not any(found.values()) and len(both := [file for file in usable if file.suffix.lower() in BOTH]) == 1:
        return dict.fromkeys(KINDS, both)
    for kind, there in found.items():
        if not there:
            listed = f"; in it: {shorten(file.name for file in files)}" if files else ""
            raise InputError(f"there is no {kind}.npy in {path}: --features needs {NAMES}{listed}")
    return found


def _parts(files: list[Path]) -> list[Path]:
    """One file, or the numbered parts of one array in order."""
    numbers = {file: int(re.search(r"(\d*)$", file.stem)[1] or -1) for file in files}
    if len({(file.parent, file.stem.rstrip("0123456789"), file.suffix) for file in files}) > 1:
        raise InputError(f"which of {shorten(files)} is meant? Leave one of them in the folder")
    files = sorted(files, key=numbers.get)
    if len(files) > 1 and [numbers[file] - numbers[files[0]] for file in files] != list(range(len(files))):
        raise InputError(f"{files[0].parent}: a part is missing among {shorten(file.name for file in files)}")
    return files


def read_embeds(files: Iterable[Path], kind: str, normalize: bool) -> np.ndarray:
    """Returns the embeddings (N, E) float32 in the files of a kind. Raises InputError for other shapes or lengths."""
    parts = [_read(file, kind) for file in files]
    if len({part.shape[1:] for part in parts}) > 1:
        raise InputError(f"{shorten(files)}: parts of different widths: {shorten(part.shape for part in parts)}")
    embeds = (np.concatenate(parts) if len(parts) > 1 else parts[0]).astype(np.float32, copy=False)
    if embeds.ndim == 3 and (kind == "text" or embeds.shape[1] == 1):  # (images, captions of each, E)
        embeds = embeds.reshape(-1, embeds.shape[2])
    norms = np.sqrt(np.einsum("...d,...d->...", embeds, embeds))
    if embeds.ndim != 2 or not embeds.size:
        raise InputError(f"{shorten(files)}: expected one row for each {kind}, found an array of shape {embeds.shape}")
    if normalize:
        if not norms.all():
            raise InputError(f"{shorten(files)}: row {norms.argmin()} is zero, which has no direction: compute it anew")
        return embeds / norms[:, None]
    if (off := np.abs(norms - 1)).max() > 1e-3:  # not for NaN, which `check_embeds` reports
        row = off.argmax()
        where = f"{shorten(files)}: row {row} has the length {norms[row]:.4g}, not 1"
        raise InputError(f"{where}: add --normalize to divide each row by its length")
    return embeds


def _read(file: Path, kind: str) -> np.ndarray:
    """The only array in a file, or the one of a kind."""
    suffix, size = file.suffix.lower(), file.stat().st_size
    if suffix in (".safetensors", ".pt", ".pth", ".bin"):
        from miniclip.utils.weight_files import read_tensors  # torch, which takes longer than all the rest

        tensors = read_tensors(file)
        tensor = tensors[_choose(file, list(tensors), kind)]
        if tensor.numel() * tensor.element_size() > 2 * size:  # a view that repeats its numbers
            raise InputError(f"{file} is refused: its {kind} embeddings are larger than the file")
        array = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().numpy()
    else:
        check_manifest(file.parent, [file.name])
        try:
            array = _read_numpy(file, size, kind)
        except InputError:
            raise
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise InputError(f"{file} is damaged, or no NumPy file ({str(error)[:120]}): write it again") from None
    if array.dtype.kind not in "fiu":
        raise InputError(f"{file} holds {array.dtype}, not real numbers: {NUMPY}")
    return array


def _choose(file: Path, names: list[str], kind: str) -> str:
    named = [name for name in names if is_kind(str(name), kind)] if len(names) > 1 else names
    if len(named) != 1:
        which = f"{shorten(named)} could be" if named else "none has a usual name of"
        raise InputError(f"{file} holds {shorten(names)}: {which} the {kind} embeddings. Save {kind}.npy instead")
    return named[0]


def _read_numpy(file: Path, size: int, kind: str) -> np.ndarray:
    with file.open("rb") as opened:
        if not zipfile.is_zipfile(opened):
            opened.seek(0)
            return _npy(opened, size, file)
        with zipfile.ZipFile(opened) as archive:
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            member = archive.getinfo(names[_choose(file, list(names), kind)])
            if member.file_size > 16 * size + (1 << 24):
                raise InputError(f"{file} is refused: unpacked it would be far larger")
            with archive.open(member) as packed:
                return _npy(packed, member.file_size, file)


def _npy(file: BinaryIO, size: int, path: Path) -> np.ndarray:
    """An array in NumPy's format, from a file of `size` bytes. `np.load` would allocate what its header declares."""
    form = np.lib.format
    if (start := file.read(8))[:1] == b"\x80":
        raise InputError(f"{path} is a pickle, which could run any program: {NUMPY}")
    readers = {b"\x93NUMPY\1\0": form.read_array_header_1_0, b"\x93NUMPY\2\0": form.read_array_header_2_0}
    if start not in readers:
        raise ValueError(f"it begins with {start!r}")
    shape, _, dtype = readers[start](file)
    if dtype.hasobject:
        raise InputError(f"{path} is a pickled array, which could run any program: {NUMPY}")
    if math.prod(shape) * dtype.itemsize != size - file.tell() or min(shape, default=0) < 0:
        raise ValueError(f"{size - file.tell()} bytes for the shape {shape} of {dtype}")
    file.seek(0)
    return form.read_array(file, allow_pickle=False)


def read_features(
    path: str | Path, records: list[dict] | None, first_caption_only: bool = False, normalize: bool = False
) -> Features:
    """Returns embeddings made elsewhere, images (N, E) and texts (M, E), and their records. Without `records` each
    image has M / N captions. If only first captions count, those of the others are dropped. Raises InputError for
    files that cannot be read and numbers of embeddings that do not fit the records."""
    images, texts = (read_embeds(files, kind, normalize) for kind, files in find_features(path).items())
    if records is None:
        records = [{"image": row, "caption": [""] * (len(texts) // len(images))} for row in range(len(images))]
    counts = [len(record["caption"]) for record in records]
    if (len(images), len(texts)) != (len(records), sum(counts)):  # perhaps as evaluate.py merges and saves them
        merged = one_per_image(records, path)
        again = [len(record["caption"]) for record in merged]
        if len(images) == len(merged) and len(texts) in (sum(again), len(merged) if first_caption_only else 0):
            records, counts = merged, again
    if len(records) != len(images):
        hint = ": that is one for each caption, save one for each image" if len(images) == sum(counts) else ""
        raise InputError(f"{path}: {len(images)} image embeddings for {len(records)} images{hint}")
    if first_caption_only and len(texts) == sum(counts):
        texts = texts[np.cumsum([0, *counts[:-1]])]
    return images, texts, records
