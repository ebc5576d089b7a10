"""Building and updating an image index."""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from miniclip.datasets.records import ImageRoot
from miniclip.index.image_index import FORMAT, GENERATION, INDEX, ImageIndex, ImageIndexError, fingerprint, read_about
from miniclip.index.neighbours import Neighbours, check_method, choose
from miniclip.inference.embed import embed_images, embed_patches, embed_texts
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache, has_tokens
from miniclip.inference.precision import settle
from miniclip.utils import bad_samples
from miniclip.utils.errors import InputError
from miniclip.utils.files import delete, lock, remove_scratch, replacing, sha256, write_json, write_npy
from miniclip.utils.image_files import ENDINGS, ImageError, ImageFile
from miniclip.utils.parallel import read_ahead

NEW = "under-way"
# What the folder of an index may contain; operating systems create the last ones anywhere.
OURS = re.compile(rf"{GENERATION.pattern}|{NEW}|{re.escape(INDEX)}|lost\+found|Thumbs\.db|desktop\.ini|@eaDir|\..*")
UNOPENED = "cannot be opened"  # how the reasons for such files and folders begin
PIECE = 512  # images after which vectors are saved: the most that a killed run computes in vain
DEAD = 0.1  # share of rows without a file above which an approximate index is rebuilt
SETTLED = 2e9  # nanoseconds after which an unchanged time means an unchanged file
# Queries that measure the recall of an approximate index, beside images: the two kinds have different neighbours.
TEXTS = [f"a photo of {what} {where}" for what in ("a person", "two people", "a dog", "a red dress", "a car", "food",
         "shoes", "a building", "a child", "a drawing") for where in ("", "outdoors", "indoors", "on white", "at night",
         "in the snow", "by the sea", "in a street", "from above", "close up")]  # fmt: skip


def update(
    root: str | Path, folder: str | Path, model, preprocess, tokenizer, named: dict[str, str | None],
    shard: tuple[int, int] = (1, 1), method: str | None = None, check: bool = False, allow_outside: bool = False,
    moved: bool = False, batch_size: int = 32, num_workers: int | None = None, progress: bool = False,
    precision: str | None = None,
) -> Counter:  # fmt: skip
    """Creates or updates the index in `folder` from the images in the folder `root`, at any depth. Returns the numbers
    of files added, changed, removed, unchanged, bad and kept (those that cannot be opened now, or whose folder cannot,
    stay as they were), and of images encoded.

    `named` is the model's name in messages and for `load`: {"name": ..., "pretrained": ...}. Files with unchanged size
    and times are not read again unless `check`. `shard` (i, n) selects shard i of n of the files, by name; one without
    images makes no index. `method` is one of `neighbours.METHODS` or "auto"; default: that of the existing index. An
    index keeps the `precision` of its vectors, "fp32", "bf16" or, by default, what "auto" finds for the first run.

    Raises ImageIndexError for an index of another model, precision or image folder (unless it was `moved`), for a
    folder that contains anything else, and if there are no images; InputError if another process is writing to it."""
    check_method(method or "auto")
    root, folder, mine = ImageRoot(root, allow_outside), Path(folder), fingerprint(model, preprocess)
    names, broken = find_images(root, shard)
    closed = tuple(f"{place}/" for place, reason in broken.items() if reason.startswith(UNOPENED))
    if not names:
        if shard[1] > 1 and not (folder / INDEX).exists() and not closed and find_images(root, (1, 1))[0]:
            return Counter()
        problem = "contains no images, and the index is unchanged: is it the right folder?"
        raise no_images(f"{root.folder} {problem}", broken)
    old, held = open_to_write(folder, True, mine, named["name"], root.folder if not moved else None, shard)
    before, known = (old.files(), set(old.keys)) if old else ({}, set())
    method = method or (old.about["search"]["asked"] if old else "auto")
    made = old and old.about["model"]["precision"]
    if old and precision not in (None, "auto", made):
        raise ImageIndexError(f"{folder} is in {made}, not in {precision}: remove --precision, or make another index")
    precision = made or settle(model, precision or "auto")
    place = mine if precision == "fp32" else hashlib.sha256(f"{mine} {precision}".encode()).hexdigest()
    journal, patches = FeatureCache(folder / NEW, place, model.config.embed_dim), None
    if has_tokens(model):  # of late interaction, a second journal
        grid = embed_patches(model, preprocess, [Image.new("RGB", (8, 8))]).shape[1:]
        patches = FeatureCache(folder / NEW, mine[::-1], grid[0] * grid[1], "<f2")
    resumed, fast, files, faulty = len(journal), inference_copy(model, precision), {}, {}

    def identify(name: str):
        """Returns the file's path, its content's key, and its size and times; or the name, None, and what is wrong."""
        try:
            path = root.file(name)
            found = os.stat(path)
            stamp = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if not check and name in before and before[name][1] == stamp:
                return path, before[name][0], stamp
            key = bytes.fromhex(sha256(path))
            # A second write within one tick of the file system's clock leaves the time as it is.
            return path, key, stamp if time.time_ns() - max(stamp[1:]) > SETTLED else (stamp[0], 0, 0)
        except FileNotFoundError:
            return name, None, "was removed during the run"
        except InputError as error:
            return name, None, str(error).removeprefix(f"{name}: ").removeprefix(f"{name!r}: ")
        except OSError as error:
            return name, None, f"{UNOPENED} ({error.strerror})"

    with tqdm(total=len(names), desc="images", disable=not progress) as bar:
        for start in range(0, len(names), PIECE):
            piece, fresh = names[start : start + PIECE], {}
            for name, (path, key, stamp) in zip(piece, read_ahead(identify, piece, num_workers, 64)):
                if key is None:
                    broken[name] = stamp
                    continue
                files[name] = key, stamp
                if key not in known and key not in journal and key not in faulty:
                    fresh.setdefault(key, IndexedImage(key)).paths.append(path)
            if fresh:
                faults, keys, images = {}, list(fresh), list(fresh.values())
                how = {"batch_size": batch_size, "num_workers": num_workers, "faults": faults}
                vectors = embed_images(fast, preprocess, images, **how)
                if patches is not None:
                    found = embed_patches(model, preprocess, images, **how)
                    patches.update((key, found[row].ravel()) for row, key in enumerate(keys) if row not in faults)
                    patches.save()  # first: what is in the journal is complete
                journal.update((key, vectors[row]) for row, key in enumerate(keys) if row not in faults)
                journal.save()
                faulty |= {keys[row]: reason for row, reason in faults.items()}
            bar.update(len(piece))
    # The images of a disk that fails or of a folder without permission are not gone.
    kept = {name: found for name, found in before.items()
            if name.startswith(closed) or broken.get(name, "").startswith(UNOPENED)}  # fmt: skip
    broken |= {name: faulty[key] for name, (key, _) in files.items() if key in faulty}
    if not (files := kept | {name: found for name, found in files.items() if found[0] not in faulty}):
        raise no_images(f"{root.folder}: none of its {len(names)} images can be read. The first:", broken)

    changes = Counter(bad=len(broken), encoded=len(journal) - resumed, resumed=resumed, kept=len(kept))
    for name in files.keys() - kept.keys():
        same = name in before and before[name][0] == files[name][0]
        changes["unchanged" if same else "changed" if name in before else "added"] += 1
    changes["removed"] = len(before.keys() - files.keys())
    about = {"root": root.folder, "allow_outside": allow_outside, "shard": list(shard)}
    about["model"] = {**named, "fingerprint": mine, "precision": precision}  # which may lie elsewhere now
    was = old and [*(old.about[name] for name in about), old.about["search"]["asked"]]
    if files != before or was != [*about.values(), method] or broken != old.bad:
        used = dict.fromkeys(key for key, _ in files.values())
        keep, grown = kept_rows(old, used, method) if old else ([], None)
        new = [key for key in used if key not in known]
        keys = [*(old.keys[row] for row in keep), *new]
        vectors = chain(rows_of(old.vectors, keep) if old else (), (journal[key] for key in new))
        stored = None
        if patches is not None:
            kept = rows_of(old.patches, keep) if old else ()
            stored = (len(keys), *grid), chain(kept, (patches[key].reshape(1, *grid) for key in new))
        # Embedded now because the recall may have to be measured later, without the model.
        texts = embed_texts(fast, tokenizer, TEXTS)
        write(folder, about, vectors, keys, files, broken, texts, method, grown, progress, stored)
    delete(folder / NEW)
    held.close()
    return changes


def no_images(problem: str, broken: dict[str, str]) -> ImageIndexError:
    """Returns the error for a folder without usable images, with the first ten bad files, a line each."""
    return ImageIndexError(problem + "".join(f"\n  {name}: {reason}" for name, reason in list(broken.items())[:10]))


def find_images(root: ImageRoot, shard: tuple[int, int]) -> tuple[list[str], dict[str, str]]:
    """Returns the sorted names of a shard's images, and why folders and links cannot be used, by name."""
    names, broken, (i, n) = [], {}, shard
    for here, files in root.walk(broken.__setitem__):
        for file in files:
            name = os.path.normpath(os.path.join(here, file)).replace(os.sep, "/")
            digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
            if os.path.splitext(file)[1].lower() in ENDINGS and int.from_bytes(digest[:8], "big") % n == i - 1:
                names.append(name)
    return sorted(names), {name.replace(os.sep, "/"): reason for name, reason in broken.items()}


def open_to_write(folder: Path, check: bool, *same) -> tuple[ImageIndex | None, IO]:
    """Locks the folder of an index and deletes what killed runs left, except the vectors that they had computed.
    Returns the index that is there, if any, and the lock. `same`: the arguments of its `check_same`. Raises
    ImageIndexError for a folder that contains anything but an index, which might be the image folder."""
    if exists := (folder / INDEX).is_file():
        read_about(folder)  # an old format is reported first
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if strange := [name for name in names if not OURS.fullmatch(name)]:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        remedy = "move that away, or choose another --index" if exists else "choose another --index"
        raise ImageIndexError(f"{folder} must contain nothing but the index, and has {min(strange)!r}{more}: {remedy}")
    held = lock(folder, "--index")
    if old := ImageIndex(folder, check) if (folder / INDEX).is_file() else None:
        old.check_same(*same)
    remove_scratch(folder)
    for path in folder.iterdir():
        if GENERATION.fullmatch(path.name) and (old is None or path != old.place):
            delete(path)  # except what a search still has open on Windows
    return old, held


def kept_rows(old: ImageIndex, used: dict, method: str) -> tuple[list[int], Neighbours | None]:
    """Returns the rows of the old index to keep, and its approximate index if that only grows: it can lose no rows."""
    n = len(old.keys)
    rows = [row for row, key in enumerate(old.keys) if key in used]
    wanted = choose(len(used))[0] if method == "auto" else method
    same = old.neighbours and old.neighbours.method == wanted and len(used) < 2 * old.neighbours.built
    return (list(range(n)), old.neighbours) if same and n - len(rows) <= DEAD * n else (rows, None)


def rows_of(vectors: np.ndarray, rows: list[int]) -> Iterator[np.ndarray]:
    """Yields rows of an array, some thousands at a time."""
    for start in range(0, len(rows), 4096):
        yield vectors[rows[start : start + 4096]]


def write(
    folder: Path, about: dict, vectors: Iterable[np.ndarray], keys: list[bytes], files: dict[str, tuple], broken: dict,
    texts: np.ndarray, method: str, grown: Neighbours | None, progress: bool, patches: tuple | None = None,
):  # fmt: skip
    """Writes a generation and, once all of it is on the disk, switches to it in one step. Completes `about`, its
    `index.json`. `grown`: an approximate index without the last rows. `patches`: late interaction's shape and rows."""
    import pyarrow as pa
    import pyarrow.parquet

    numbers = {int(found[1]): path for path in folder.iterdir() if (found := GENERATION.fullmatch(path.name))}
    place = folder / f"generation-{max(numbers, default=0) + 1:06d}"
    with replacing(folder / INDEX) as index, replacing(place) as scratch:
        scratch.mkdir()
        shape = (len(keys), texts.shape[1])
        write_npy(scratch / "vectors.npy", "<f4", shape, vectors)
        if patches is not None:
            write_npy(scratch / "patches.npy", "<f2", *patches)
        write_npy(scratch / "keys.npy", "V32", shape[:1], [np.frombuffer(b"".join(keys), "V32")])
        write_npy(scratch / "texts.npy", "<f4", texts.shape, [texts])
        row = {key: i for i, key in enumerate(keys)}
        lines = sorted((row[key], name, *stamp) for name, (key, stamp) in files.items())
        columns = dict(zip(("row", "path", "size", "mtime", "ctime"), map(list, zip(*lines))))
        pa.parquet.write_table(pa.table(columns), scratch / "files.parquet")
        bad = bad_samples.BadSamples()
        for name, reason in sorted(broken.items()):
            bad.add(name, reason, "while indexing")
        bad.open(scratch / bad_samples.NAME)
        used = np.bincount(columns["row"], minlength=len(row)) > 0
        images = int(used.sum())
        chosen, why = choose(images) if method == "auto" else (method, "as it was asked for")
        about |= {"pictures": images, "copies": len(files) - images, "bad": len(broken)}
        about["search"] = {"method": chosen, "asked": method, "why": why}
        if chosen != "exact":
            stored = np.load(scratch / "vectors.npy", mmap_mode="r")
            grown = grown or Neighbours.build(stored, chosen, progress)
            grown.add(stored[grown.index.ntotal :], progress)
            about["search"] |= grown.tune(stored, None if used.all() else used, texts)
            grown.write(scratch / "search.faiss")
            del stored  # Windows renames no folder with an open file
        sizes = {path.name: [path.stat().st_size, sha256(path)] for path in sorted(scratch.iterdir())}
        write_json(index, {"format": FORMAT, "generation": place.name, **about, "files": sizes})
    for path in numbers.values():
        delete(path)  # a search that has it open keeps reading it


class IndexedImage(ImageFile):
    """An image identified by the sha256 of its content, in one or several files, of which one must still have it."""

    def __init__(self, digest: bytes):
        self.digest, self.paths = digest, []

    def __str__(self) -> str:
        return self.paths[0]

    def read(self) -> bytes:
        for path in self.paths:
            with suppress(OSError):
                data = Path(path).read_bytes()
                if hashlib.sha256(data).digest() == self.digest:
                    return data
        raise ImageError(f"{self}: it was changed or removed while it was read; index again")
