"""Image search by texts and images.

A query combines texts, images, and texts of what is not wanted. Their unit vectors become one:

    q = unit((1 - a) unit(sum of texts) + a unit(sum of images) - b unit(sum of what is not wanted))

`a` is `image_weight`: 1 without texts, 0 without images, else 0.5 by default. `b` is `minus_weight`: 0.5. The score of
an image is its cosine to q. Scores of texts are low, 0.2 to 0.4 for a good match: compare them within a query only."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from miniclip.datasets.records import ImageRoot
from miniclip.index.build import update
from miniclip.index.image_index import ImageIndex, fingerprint
from miniclip.inference.caption import captioner
from miniclip.inference.embed import embed_images, embed_texts, embed_words
from miniclip.inference.fast import inference_copy
from miniclip.inference.late_interaction import maxsim, reranked
from miniclip.inference.load import load
from miniclip.reports.contact_sheet import write_sheet
from miniclip.utils.errors import InputError


class Found(NamedTuple):
    rank: int  # from 1
    score: float  # the cosine to the query; re-ranked by late interaction, plus MaxSim
    path: str  # relative to the image folder
    copies: list[str]  # other files with the same content


class ImageSearch:
    """An index together with the model that made it.

    `model` is a folder or a config's name (with `pretrained`), or the result of `miniclip.load` without a precision;
    default: the one that made the index, in its place. `pictures`: the image folder, if moved. Raises InputError for a
    folder without an index, for a model other than the index's, and for one that cannot be loaded."""

    def __init__(self, index: str | Path, model=None, pretrained=None, device="cpu", pictures=None):
        self.index = ImageIndex(index)
        about = self.index.about
        name = model if isinstance(model, (str, Path)) else None
        if pretrained and name is None:
            raise InputError("pretrained has no effect without the name of a model: add it (--model)")
        if model is None:
            name, pretrained = about["model"]["name"], about["model"]["pretrained"]
        if name is not None:
            try:
                model = load(name, pretrained, device)
            except InputError as error:
                raise InputError(f"the model of {index}: {error}. Pass it as --model") from None
        self.model, self.preprocess, self.tokenizer = model
        self.index.check_same(fingerprint(self.model, self.preprocess), str(name or "the one given"))
        self.captioner = captioner(self.model)  # the copy writes no captions
        # Copies once, not for each query. A query in words does not wait for BatchNorms to be fused.
        self.plain, self.for_images = self.model, None
        self.model = inference_copy(self.model, fuse=False)
        if pictures and not Path(pictures).is_dir():
            raise InputError(f"{pictures} is not a folder: name the one that the images are in")
        self.root = ImageRoot(pictures or about["root"], about["allow_outside"])

    @classmethod
    def build(cls, pictures: str | Path, index: str | Path, model: str | Path, pretrained=None, device="cpu", **more):
        """Creates or updates the index of an image folder and opens it. `more`: further options of `build.update`."""
        loaded = load(model, pretrained, device)
        update(pictures, index, *loaded, model_name(model, pretrained), **more)
        return cls(index, loaded)

    def __len__(self) -> int:
        return len(self.index)

    def vector(
        self, texts: Iterable[str] = (), images: Iterable = (), minus: Iterable[str] = (),
        image_weight: float | None = None, minus_weight: float = 0.5,
    ) -> np.ndarray:  # fmt: skip
        """Returns the query vector (E,) by the formula above. Raises InputError for an empty query, weights out of
        range and a query that `minus` cancels, ImageError for an image that cannot be read."""
        texts, images, minus = ([x] if isinstance(x, (str, Path)) else list(x) for x in (texts, images, minus))
        texts, minus = ([text for text in x if text.strip()] for x in (texts, minus))
        if not texts and not images:
            raise InputError("the query is empty: give a text or an image; words that are not wanted are not enough")
        a = 0.5 if image_weight is None else image_weight
        if not 0 <= a <= 1 or not 0 <= minus_weight < float("inf"):
            raise InputError(f"image_weight {a} must be from 0 to 1, minus_weight {minus_weight} at least 0")
        a = 1.0 if not texts else 0.0 if not images else a
        words = embed_texts(self.model, self.tokenizer, texts + minus)
        if images and self.for_images is None:
            self.for_images = inference_copy(self.plain)
        shown = embed_images(self.for_images or self.model, self.preprocess, images)
        parts = (1 - a, words[: len(texts)]), (a, shown), (-minus_weight, words[len(texts) :])
        total = sum(weight * unit(part.sum(axis=0, dtype=np.float32)) for weight, part in parts)
        if np.linalg.norm(total) < 1e-4:  # the rest is rounding
            raise InputError("what is not wanted cancels the query: change the words or lower minus_weight")
        return unit(total)

    def query(
        self, text: str | Iterable[str] = (), k: int = 10, image=(), minus=(), rerank: int | None = None, **weights
    ) -> list[Found]:
        """Returns the k best images, best first. `text`, `image` (files), `minus` are one or several each; in a text,
        -word is not wanted. `weights`: of `vector`. Late interaction reorders the first `rerank` (100) of a text."""
        if k < 1:
            raise InputError(f"k is {k}: it must be at least 1")
        texts, unwanted = split_minus([text] if isinstance(text, str) else text)
        minus = [minus] if isinstance(minus, str) else list(minus)
        vector, n = self.vector(texts, image, [*minus, *unwanted], **weights), reranked(self.model, rerank)
        return self.nearest(vector, k, " ".join(texts), n) if texts and n else self.nearest(vector, k)

    def nearest(self, vector: np.ndarray, k: int, text: str = "", rerank: int = 0) -> list[Found]:
        """Returns the k images nearest to a vector (E,), the first `rerank` in late interaction's order for a text."""
        found = self.index.find(vector, max(k, rerank))
        if rerank:
            scores, rows = (np.array(values) for values in zip(*found))
            words = torch.from_numpy(embed_words(self.model, self.tokenizer, [text]))
            patches = torch.from_numpy(self.index.patches[rows[:rerank]]).float()
            scores[:rerank] += maxsim(words, patches)[0].numpy()
            order = [*np.argsort(-scores[:rerank], kind="stable"), *range(rerank, len(rows))]
            found = [(scores[i].item(), rows[i].item()) for i in order]
        paths = [(score, self.index.paths(row)) for score, row in found[:k]]
        return [Found(rank, score, names[0], names[1:]) for rank, (score, names) in enumerate(paths, 1)]

    def file(self, path: str) -> str:
        """Returns the absolute path of an image found. Raises InputError if it is gone or leads out of the folder."""
        return ImageRoot(self.root.folder, self.root.allow_outside).file(path)  # a new one: links may have changed

    def write_sheet(self, path: str | Path, title: str, found: list[Found]):
        """Writes a contact sheet: one HTML file with the images embedded."""
        write_sheet(path, title, found, self.file, f"{len(self)} images in {self.root.folder}; score: cosine")


def model_name(model: str | Path, pretrained: str | Path | None) -> dict[str, str | None]:
    """Returns how an index names its model: the absolute paths of files and folders, names and tags as they are."""

    def whole(name: str | Path | None) -> str | None:
        path = Path(str(name or "").removeprefix("local-dir:") or "?")
        return str(path.resolve()) if path.exists() else None if name is None else str(name)

    return {"name": whole(model), "pretrained": whole(pretrained)}


def split_minus(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns texts without their -words, and these without the dash: "red dress -floral" does not want floral."""
    texts, minus = list(texts), re.compile(r"(?<!\S)-([^\W\d_]\S*)\s*")
    wanted = [minus.sub("", text).strip() for text in texts]
    return [text for text in wanted if text], [word for text in texts for word in minus.findall(text)]


def unit(vector: np.ndarray) -> np.ndarray:
    """Returns a vector (E,) scaled to length 1; zero stays zero."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
