"""TODO docstring."""

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from miniclip.datasets.records import ImageRoot
from miniclip.index.image_index import (
    DEAD,
    FORMAT,
    GENERATION,
    INDEX,
    NEW,
    OURS,
    PIECE,
    SETTLED,
    SYSTEMS,
    TEXTS,
    ImageIndex,
    ImageIndexError,
    check_same,
    fingerprint,
    read_about,
)
from miniclip.index.neighbours import Neighbours, check_method, choose
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.utils.bad_samples import NAME as BAD
from miniclip.utils.bad_samples import BadSamples
from miniclip.utils.errors import InputError
from miniclip.utils.files import lock, sha256, sync, write_json, write_npy
from miniclip.utils.image_files import ImageError, ImageFile, endings
from miniclip.utils.parallel import read_ahead


def update(
    root: str | Path,
    folder: str | Path,
    model,
    preprocess,
    tokenizer,
    named: dict[str, str | None],
    shard: tuple[int, int] = (1, 1),
    method: str | None = None,
    check: bool = False,
    allow_outside: bool = False,
    moved: bool = False,
    batch_size: int = 32,
    num_workers: int | None = None,
    progress: bool = False,
) -> Counter:
    """Brings the index in `folder` to what is in the folder `root`, at any depth; makes it where there is none. Gives
    how many files were added, changed, removed, unchanged and bad, and how many pictures were encoded. What lies in
    folders that cannot be opened, or cannot be opened itself, stays as it was, and is counted as kept.

    `named` is what to say and load the model by: {"name": ..., "pretrained": ...}. A file is the same while its size
    and times are; with `check` all are read. `shard` (i, n) takes the i-th n-th of the files, by their names: where it
    gets none, no index is made. `method` is one of `neighbours.METHODS`, or "auto"; unless given, what it was the last
    time. Raises ImageIndexError for an index of another model or folder (unless that was `moved`), for a folder with
    something else in it, and where there are no pictures; InputError where another process is writing to it.
    """
    check_method(method or "auto")
    root, folder, mine = ImageRoot(root, allow_outside), Path(folder), fingerprint(model, preprocess)
    names, broken, closed = pictures(root, shard)
    if not names:
        if shard[1] > 1 and not (folder / INDEX).exists() and not closed and pictures(root, (1, 1))[0]:
            return Counter()
        unread = "".join(f"\n  {name}: {reason}" for name, reason in list(broken.items())[:10])
        raise ImageIndexError(
            f"{root.folder}: there is no picture in it, and no index was touched: is another meant?{unread}"
        )
    check_ours(folder)
    held = lock(folder, "--index")
    old = ImageIndex(folder, check=True) if (folder / INDEX).is_file() else None
    if old:
        check_same(old, mine, named["name"], root.folder if not moved else None, shard)
    clean(folder, old)
    before = old.files() if old else {}
    method = method or (old.about["search"]["asked"] if old else "auto")
    known = {old.key(row) for row in range(len(old.vectors))} if old else set()
    journal = FeatureCache(folder / NEW, mine, model.config.embed_dim)
    resumed, fast, files, faulty, unreadable = len(journal), inference_copy(model), {}, {}, set()

    def identify(name: str):
        """The file's path, its content's key, and by what it is known to be the same; or what is wrong with it."""
        try:
            path = root.file(name)
            found = os.stat(path)
            stamp = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if not check and name in before and before[name][1] == stamp:
                return path, before[name][0], stamp
            key = bytes.fromhex(sha256(path))
            # Who writes to it in the same tick of the file system's clock leaves its time as it is.
            return path, key, stamp if time.time_ns() - max(stamp[1:]) > SETTLED else (stamp[0], 0, 0)
        except FileNotFoundError:
            return name, None, "was removed meanwhile"
        except InputError as error:
            reason = str(error).removeprefix(f"{name}: ").removeprefix(f"{name!r}: ")
        except OSError as error:
            reason = f"cannot be opened ({error.strerror})"
        if name in before and reason.startswith("cannot be opened"):
            unreadable.add(name)
        return name, None, reason

    with tqdm(total=len(names), desc="pictures", disable=not progress) as bar:
        for start in range(0, len(names), PIECE):
            piece, fresh = names[start : start + PIECE], {}
            for name, (path, key, stamp) in zip(piece, read_ahead(identify, piece, num_workers, 64)):
                if key is None:
                    broken[name] = stamp
                    continue
                files[name] = key, stamp
                if key not in known and key not in journal and key not in faulty:
                    fresh.setdefault(key, Picture(key)).paths.append(path)
            if fresh:
                faults, keys = {}, list(fresh)
                vectors = embed_images(fast, preprocess, fresh.values(), batch_size, num_workers, faults=faults)
                journal.update((key, vectors[row]) for row, key in enumerate(keys) if row not in faults)
                journal.save()
                faulty |= {keys[row]: reason for row, reason in faults.items()}
            bar.update(len(piece))
    broken |= {name: faulty[key] for name, (key, _) in files.items() if key in faulty}
    files = {name: found for name, found in files.items() if found[0] not in faulty}
    # A disk that fails, a folder that must not be read: its pictures are not gone.
    below = tuple(f"{place}/" for place in closed)
    kept = {name: found for name, found in before.items() if name.startswith(below) or name in unreadable}
    files = kept | files
    if not files:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in list(broken.items())[:10])
        raise ImageIndexError(f"{root.folder}: none of its {len(names)} pictures can be read. The first:{listed}")

    changes = Counter(bad=len(broken), encoded=len(journal) - resumed, resumed=resumed, kept=len(kept))
    for name, (key, _) in files.items():
        if name not in kept:
            changes["added" if name not in before else "unchanged" if before[name][0] == key else "changed"] += 1
    changes["removed"] = len(before.keys() - files.keys())
    wanted = [root.folder, allow_outside, method]
    was = old and [old.about["root"], old.about["allow_outside"], old.about["search"]["asked"]]
    if files != before or wanted != was or broken != old.bad:
        used = dict.fromkeys(key for key, _ in files.values())
        keep, grown = kept_rows(old, used, method)
        new = [key for key in used if key not in known]
        keys = b"".join([*(old.key(row) for row in keep), *new])
        about = {"model": {**named, "fingerprint": mine}, "root": root.folder, "allow_outside": allow_outside}
        about |= {"shard": list(shard)}
        vectors = rows_of((old and old.vectors, keep), (journal, new))
        # Now, because how much a graph or lists miss may have to be measured later, without the model.
        texts = embed_texts(fast, tokenizer, TEXTS)
        write(folder, about, vectors, keys, files, broken, texts, method, grown, progress)
    shutil.rmtree(folder / NEW, ignore_errors=True)
    held.close()
    return changes


def pictures(root: ImageRoot, shard: tuple[int, int]) -> tuple[list[str], dict[str, str], list[str]]:
    """The files of a shard that by their names are pictures, in order; what could not be looked into, name -> reason;
    and which folders of that could not be opened."""
    names, broken, closed, (i, n), known = [], {}, [], shard, endings()

    def fault(name: str, reason: str):
        name = name.replace(os.sep, "/")
        broken[name] = reason
        if reason.startswith("cannot be opened"):
            closed.append(name)

    for here, files in root.walk(fault):
        for file in files:
            name = os.path.normpath(os.path.join(here, file)).replace(os.sep, "/")
            digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
            if os.path.splitext(file)[1].lower() in known and int.from_bytes(digest[:8], "big") % n == i - 1:
                names.append(name)
    return sorted(names), broken, closed


def kept_rows(old: ImageIndex | None, used: dict, method: str) -> tuple[list[int], Neighbours | None]:
    """Which rows of the old index go on, and its graph or lists where those only have to grow: rows can be added to
    them, not taken out, but passed over."""
    if old is None:
        return [], None
    rows = [row for row in range(len(old.vectors)) if old.key(row) in used]
    wanted = choose(len(used))[0] if method == "auto" else method
    few = len(old.vectors) - len(rows) <= DEAD * len(old.vectors)
    if old.neighbours and old.neighbours.method == wanted and few and len(used) < 2 * old.neighbours.built:
        return list(range(len(old.vectors))), old.neighbours
    return rows, None


def rows_of(*sources: tuple) -> Iterator[np.ndarray]:
    """Vectors from one place and another, of each (what to ask, its rows or keys), some thousands at a time."""
    for source, rows in sources:
        for start in range(0, len(rows), 4096):
            part = rows[start : start + 4096]
            yield source[part] if isinstance(source, np.ndarray) else np.stack([source[key] for key in part])


def write(
    folder: Path, about: dict, vectors: Iterable[np.ndarray], keys: bytes, files: dict[str, tuple], broken: dict,
    texts: np.ndarray, method: str, grown: Neighbours | None, progress: bool,
):  # fmt: skip
    """Writes a generation, and switches to it."""
    import pyarrow as pa
    import pyarrow.parquet

    numbers = {int(found[1]): path for path in folder.iterdir() if (found := GENERATION.fullmatch(path.name))}
    place = folder / f"generation-{max(numbers, default=0) + 1:06d}"
    place.mkdir()
    try:
        shape = (len(keys) // 32, texts.shape[1])
        write_npy(place / "vectors.npy", "<f4", shape, vectors)
        write_npy(place / "keys.npy", "V32", shape[:1], [np.frombuffer(keys, "V32")])
        write_npy(place / "texts.npy", "<f4", texts.shape, [texts])
        row = {keys[32 * i : 32 * i + 32]: i for i in range(shape[0])}
        lines = sorted((row[key], name, *stamp) for name, (key, stamp) in files.items())
        columns = dict(zip(("row", "path", "size", "mtime", "ctime"), map(list, zip(*lines))))
        pa.parquet.write_table(pa.table(columns), place / "files.parquet")
        bad = BadSamples()
        bad.open(place / BAD)
        for name, reason in sorted(broken.items()):
            bad.add(name, reason, "while indexing")
        pictures = len({key for key, _ in files.values()})
        about |= {"pictures": pictures, "copies": len(files) - pictures, "bad": len(broken)}
        about["search"] = prepare(place, shape, lines, texts, method, grown, progress)
        for path in [*place.iterdir(), place]:
            sync(path)
        sizes = {path.name: [path.stat().st_size, sha256(path)] for path in sorted(place.iterdir())}
        write_json(folder / INDEX, {"format": FORMAT, "generation": place.name, **about, "files": sizes})
    except BaseException:
        if not (folder / INDEX).is_file() or read_about(folder)["generation"] != place.name:
            shutil.rmtree(place, ignore_errors=True)
        raise
    for path in numbers.values():
        shutil.rmtree(path, ignore_errors=True)  # who has it open goes on reading it


def prepare(place: Path, shape: tuple, lines: list, texts: np.ndarray, method: str, grown, progress: bool) -> dict:
    """What `index.json` says of how an index is searched; above 100,000 vectors makes what that takes."""
    chosen, why = choose(len({line[0] for line in lines}))
    if method != "auto":
        chosen, why = method, "as it was asked for"
    about = {"method": chosen, "asked": method, "why": why}
    if chosen == "exact":
        return about
    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    used = np.zeros(shape[0], bool)
    used[[line[0] for line in lines]] = True
    alive = None if used.all() else used
    if grown is None:
        grown = Neighbours.build(vectors, chosen, progress)
    else:
        grown.add(vectors[len(grown) :], progress)
    found = grown.tune(vectors, alive, texts)
    grown.write(place / "search.faiss")
    return {**about, "parameters": grown.parameters(), "built": grown.built, **found}


def clean(folder: Path, current: ImageIndex | None):
    """Deletes what killed runs have left, but for the vectors that they had computed."""
    for path in folder.iterdir():
        if GENERATION.fullmatch(path.name) and (current is None or path != current.place):
            shutil.rmtree(path, ignore_errors=True)  # somebody may have it open, which some systems do not allow
        elif path.name.endswith(f".{INDEX}"):
            path.unlink()


def check_ours(folder: Path):
    """Raises ImageIndexError for a folder with something else than an index in it, which might be the pictures'. What
    systems leave in any folder is passed over."""
    if (folder / INDEX).is_file():
        read_about(folder)  # of another format it is to be said first
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    strange = [name for name in names if not OURS.fullmatch(name) and name[0] != "." and name not in SYSTEMS]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        remedy = "move that away, or name another --index" if INDEX in names else "name another --index"
        raise ImageIndexError(f"{folder} is to be a folder with nothing but the index in it, and has"
                              f" {min(strange)!r}{more}: {remedy}")  # fmt: skip


class Picture(ImageFile):
    """A picture as it was when its content was looked at, in one file or several: `read` gives those bytes. Raises
    ImageError if none of them has it now."""

    def __init__(self, key: bytes):
        self.digest, self.paths = key, []

    def __str__(self) -> str:
        return self.paths[0]

    def key(self) -> bytes:
        return self.digest

    def read(self) -> bytes:
        for path in self.paths:
            with suppress(OSError):
                data = Path(path).read_bytes()
                if hashlib.sha256(data).digest() == self.digest:
                    return data
        raise ImageError(f"{self}: it was changed or removed while it was read; index again")
