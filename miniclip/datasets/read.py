"""In which forms can pairs come, and how does each become the same records?

    captions.json                     [{"image": "a.jpg", "caption": ["a dog", "my dog"]}, ...]
    captions.jsonl                    one such object a line
    captions.csv, captions.tsv        a line of column names, then one caption a line
    folder/                           images, each with a.txt, a.caption or a.json beside it
    shards/{000..123}.tar, shards/    WebDataset shards (`miniclip.datasets.shards`)
    hf:NAME, hf:NAME:SPLIT            a data set of the Hugging Face hub; also hf:NAME:CONFIG:SPLIT
    folder/, folder:SPLIT             what `save_to_disk` of Hugging Face datasets wrote
    *.parquet, *.arrow                its tables
    A::B                              several of them
    A[:300]                           only the first 300 records

Whatever the form, `read_source` gives a sequence of {"image": where, "caption": [strings]}, where `where` is a path, or
for an image that is no file of its own a handle: `read` gives its bytes, `str` its name. `python -m miniclip.sources
convert FROM TO` turns one form into another.
"""

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from miniclip.datasets.mixture import Mixture, Part, parse_factors
from miniclip.datasets.records import ImageRoot, check_records, image_fault, read_captions
from miniclip.datasets.shards import Shards, expand
from miniclip.datasets.tables import Table, _at_split, _is_table, load_table, table_image_root
from miniclip.datasets.text_files import READERS, _read_folder
from miniclip.utils.bad_samples import BadSamples, CaptionFileError, leave_out
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError
from miniclip.utils.parallel import read_ahead

logger = logging.getLogger(__name__)


def read_source(
    spec: str,
    image_root: str | None = None,
    check_images: bool = True,
    on_bad: str = "stop",
    *,
    allow_outside: bool = False,
    bad_samples: BadSamples | None = None,
    check_handles: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    factors: str | None = None,
    num_samples: int | None = None,
) -> Sequence[dict]:
    """The records of a source in any of the forms above.

    `image_root`, `check_images`, `on_bad`, `allow_outside` and `bad_samples` are those of `read_captions`; of several
    sources each may have its root (`A::B`). `check_images` is for images in files of their own; `check_handles` decodes
    the others once too, which otherwise training finds to be damaged. `image_column` and `caption_column` name columns
    where they are not to be guessed. `factors` ("1::2.5") and `num_samples` make an epoch as `Mixture` says. Raises
    InputError for what cannot be read, for all sources together.
    """
    specs, sources, problems = split(spec), [], []
    roots = split(image_root) if image_root else [None]
    if len(roots) not in (1, len(specs)):
        raise InputError(f"{spec}: {len(roots)} image roots for {len(specs)} sources: give one, or one for each")
    for part, root in zip(specs, itertools.cycle(roots)):
        try:
            bad = {"on_bad": on_bad, "bad_samples": bad_samples}
            how = (bad, allow_outside, check_images, check_handles)
            sources.append(_read_one(part, root, *how, image_column, caption_column))
        except InputError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise CaptionFileError("\n".join(map(str, problems)))
    if factors is None and num_samples is None:
        if all(isinstance(source, list) for source in sources):
            return list(itertools.chain(*sources))
        if len(sources) == 1:
            return sources[0]
    return Mixture(sources, parse_factors(factors, len(sources)), num_samples)


def split(spec: str) -> list[str]:
    """The sources in a specification, which `::` separates."""
    parts = [part.strip() for part in str(spec).split("::")]
    if not all(parts):
        raise InputError(f"{spec!r}: there is nothing at one side of a ::")
    return parts


def _read_one(
    spec, root, bad: dict, allow_outside, check_images, check_handles, image_column, caption_column
) -> Sequence[dict]:
    suffix, path = Path(spec).suffix.lower(), Path(spec)
    columns = (image_column, caption_column)
    if not spec.startswith("hf:") and (first := re.fullmatch(r"(.+)\[:(\d+)\]", spec)):
        how = (root, bad, allow_outside, check_images, check_handles, *columns)
        source = _read_one(first[1], *how)
        n = min(int(first[2]), len(source))
        return source[:n] if isinstance(source, list) else Part(source, np.arange(n))
    if suffix in READERS or path.is_dir() and not _is_table(path) and not any(path.glob("*.tar")):
        if suffix == ".json" and columns == (None, None):
            return read_captions(path, root, check_images, allow_outside=allow_outside, **bad)
        folder = ImageRoot(path if path.is_dir() else root or path.parent, allow_outside)
        raw, names = READERS[suffix](path, *columns) if suffix in READERS else _read_folder(folder, caption_column)
        return check_records(path, raw, folder, check_images, names=names, **bad)
    if suffix in (".tar", ".tgz") or re.search(r"\.tar\.\w+$", spec) or path.is_dir() and any(path.glob("*.tar")):
        paths = sorted(map(str, path.glob("*.tar"))) if path.is_dir() else expand(spec)
        missing = [p for p in paths if not os.path.isfile(p)]
        if bad["on_bad"] == "skip" and 0 < len(missing) < len(paths):
            what = f"{len(missing)} of {len(paths)} shards are not there"
            leave_out(spec, what, [(path, "no such file") for path in missing], len(paths) - len(missing), "", **bad)
            paths = [p for p in paths if p not in set(missing)]
        source = Shards(paths, caption_column, **bad)
    elif spec.startswith("hf:") or suffix in (".parquet", ".arrow") or _is_table(Path(_at_split(spec)[0])):
        root = table_image_root(spec, root, allow_outside)
        source = Table(load_table(spec), spec, *columns, root, **bad)
    elif not path.exists():
        raise InputError(f"{spec}: no such file or folder (a data set of the Hugging Face hub is hf:{spec})")
    else:
        known = ", ".join((*READERS, ".tar", ".parquet", ".arrow", "a folder", "hf:NAME"))
        raise InputError(f"{spec}: of no form that is known: {known}")
    return without_damaged(source, spec, **bad) if check_handles else source


def without_damaged(source: Sequence[dict], spec: str, on_bad: str = "stop", **bad) -> Sequence[dict]:
    """The records whose pictures can be decoded. About the others see `leave_out`."""

    def fault(index: int) -> str | None:
        try:
            return image_fault(source[index]["image"])
        except ImageError as error:
            return str(error)

    work = read_ahead(fault, range(len(source)), None, 1000)
    faults = list(tqdm(work, f"checking the images of {Path(spec).name}", len(source), disable=len(source) < 1000))
    good = [row for row, problem in enumerate(faults) if not problem]
    if len(good) == len(source):
        return source
    problems = [(f"sample {row}", problem) for row, problem in enumerate(faults) if problem]
    what = f"{len(problems)} of {len(source)} images are damaged"
    leave_out(spec, what, problems, len(good), f"{spec}: ", on_bad, **bad)
    return Part(source, np.array(good))


def describe(records: Sequence[dict], tokenizer, most: int = 100_000) -> str:
    """One line on what a model is going to learn from. Of more than `most` images, the captions of the first only are
    counted, which takes a minute."""
    captions = [record["caption"] for record, _ in zip(records, range(most))]
    texts = [text for texts in captions for text in texts]
    cut = sum(len(tokenizer.encode(text)) > tokenizer.context_length - 2 for text in texts)
    files = Counter(record["image"] for record in records) if isinstance(records, list) else {}
    again = sum(n - 1 for n in files.values())
    duplicates = f"; {again} records have the image of another one: duplicates (--duplicates)" if again else ""
    of = f" (of the first {most:,} images)" if len(records) > most else ""
    at = f"{tokenizer.context_length} tokens"
    return f"{len(records)} images, {len(texts)} captions{of}, {cut} of them cut off at {at}{duplicates}"
