"""Which of my pictures show this?

    import miniclip

    search = miniclip.ImageSearch("products.mc")                        # made by python -m miniclip search index
    for found in search.query("red dress with floral pattern", k=5):
        print(found.rank, found.score, found.path)

A query is texts, pictures, and texts of what is not wanted. From their vectors, all of unit length, comes one:

    q = unit((1 - a) unit(sum of texts) + a unit(sum of pictures) - b unit(sum of what is not wanted))

`a` is `image_weight`, 1 without texts and 0 without pictures, else 0.5 unless given; `b` is `minus_weight`, 0.5. The
score of a picture is its cosine to q. Those of texts are low, 0.2 to 0.4 for a good match: compare them within a query.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from miniclip.datasets.records import ImageRoot
from miniclip.index.build import update
from miniclip.index.image_index import ImageIndex, check_same, fingerprint
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.fast import inference_copy
from miniclip.inference.load import load
from miniclip.reports.contact_sheet import write_sheet
from miniclip.utils.errors import InputError


class Found(NamedTuple):
    """A picture that was found: its place, from 1, its cosine to the query, its file, relative to the folder that was
    indexed, and the files with the same content."""

    rank: int
    score: float
    path: str
    copies: list[str]


class ImageSearch:
    """An index with the model that made it, to be asked.

    `model` is a folder or a config's name (with `pretrained`), or what `miniclip.load` gives, without a precision;
    unless given, the one that the index was made by, from where it was then. `pictures` is their folder, where that is
    not any more where it was. Raises ImageIndexError for what is no index, or was made by another model.
    """

    def __init__(self, index: str | Path, model=None, pretrained=None, device="cpu", pictures=None):
        self.index = ImageIndex(index)
        about = self.index.about
        name = model if isinstance(model, (str, Path)) else None
        if model is None:
            name, pretrained = about["model"]["name"], about["model"]["pretrained"]
        if name is not None:
            try:
                model = load(name, pretrained, device)
            except InputError as error:
                raise InputError(f"the model of {index}: {error}. Name it by --model") from None
        self.model, self.preprocess, self.tokenizer = model
        check_same(self.index, fingerprint(self.model, self.preprocess), str(name or "the one given"), None)
        self.model = inference_copy(self.model)  # now, not with each query
        self.root = ImageRoot(pictures or about["root"], about["allow_outside"])

    @classmethod
    def build(cls, pictures: str | Path, index: str | Path, model: str | Path, pretrained=None, device="cpu", **how):
        """Makes the index of a folder of pictures, or brings it up to date, and opens it. `how`: as `update` has it."""
        loaded = load(model, pretrained, device)
        update(pictures, index, *loaded, model_name(model, pretrained), **how)
        return cls(index, loaded)

    def __len__(self) -> int:
        return len(self.index)

    def vector(
        self,
        texts: Iterable[str] = (),
        images: Iterable = (),
        minus: Iterable[str] = (),
        image_weight: float | None = None,
        minus_weight: float = 0.5,
    ) -> np.ndarray:
        """The vector (E,) that is asked for, as the formula above has it. Raises InputError where nothing is wanted,
        ImageError for a picture that cannot be read."""
        texts, images, minus = ([x] if isinstance(x, (str, Path)) else list(x) for x in (texts, images, minus))
        texts, minus = ([text for text in x if text.strip()] for x in (texts, minus))
        if not texts and not images:
            raise InputError("nothing is asked for: give a text or a picture; words not wanted are not enough")
        a = 0.5 if image_weight is None else image_weight
        if not 0 <= a <= 1 or not 0 <= minus_weight < float("inf"):
            raise InputError(f"image_weight {a} must lie in 0 to 1, minus_weight {minus_weight} not below 0")
        a = 1.0 if not texts else 0.0 if not images else a
        width = self.index.vectors.shape[1]
        total = np.zeros(width, np.float32)
        words = embed_texts(self.model, self.tokenizer, texts + minus) if texts or minus else np.zeros((0, width))
        shown = embed_images(self.model, self.preprocess, images) if images else np.zeros((0, width))
        for weight, part in ((1 - a, words[: len(texts)]), (a, shown), (-minus_weight, words[len(texts) :])):
            total += weight * unit(part.sum(axis=0, dtype=np.float32))
        if np.linalg.norm(total) < 1e-4:  # what remains is rounding
            raise InputError("what is not wanted takes away all that is asked for: say something else, or less of it")
        return unit(total)

    def query(self, text: str | Iterable[str] = (), k: int = 10, image=(), minus=(), **weights) -> list[Found]:
        """The k pictures that fit best, best first; fewer where there are no more. `text`, `image` (files) and `minus`
        are one each or several; `weights` as `vector` has them. In a text, -word is one that is not wanted."""
        if k < 1:
            raise InputError(f"k is {k}: ask for 1 or more")
        texts, unwanted = split_minus([text] if isinstance(text, str) else text)
        minus = [minus] if isinstance(minus, str) else list(minus)
        return self.nearest(self.vector(texts, image, [*minus, *unwanted], **weights), k)

    def nearest(self, vector: np.ndarray, k: int) -> list[Found]:
        """The k pictures that are nearest to a vector (E,)."""
        found = []
        for rank, (score, row) in enumerate(self.index.find(vector[None].astype(np.float32), k)[0], 1):
            path, *copies = self.index.paths(row)
            found.append(Found(rank, score, path, copies))
        return found

    def file(self, path: str) -> str:
        """Where a picture that was found lies. Raises InputError for one that is not there any more, or that leads out
        of the folder that was indexed."""
        return ImageRoot(self.root.folder, self.root.allow_outside).file(path)  # which remembers: links may be new

    def write_sheet(self, path: str | Path, title: str, found: list[Found]):
        """Writes what was found as one HTML file with the pictures in it."""
        write_sheet(path, title, found, self.file, f"{len(self)} pictures in {self.root.folder}; score: cosine")


def model_name(model: str | Path, pretrained: str | Path | None) -> dict[str, str | None]:
    """What an index keeps to find its model again: files and folders from the root on, names of configs as they are."""
    return {
        "name": str(Path(model).resolve()) if Path(model).exists() else str(model),
        "pretrained": str(Path(pretrained).resolve()) if pretrained else None,
    }


def split_minus(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Texts without their -words, and those without their dash: "red dress -floral" wants no floral."""
    wanted, unwanted = [], []
    for text in texts:
        words = text.split()
        minus = [word for word in words if len(word) > 1 and word[0] == "-" and word[1].isalpha()]
        unwanted += [word[1:] for word in minus]
        wanted.append(" ".join(word for word in words if word not in minus) if minus else text)
    return [text for text in wanted if text.strip()], unwanted


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector (E,) at length 1; zero as it is."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
