"""Late interaction: a second stage that compares words with patches.

    score(image, text) = cosine(image, text) + sum over words w of max over patches p of <w, p>        (MaxSim)

Patches p are unit vectors. A word's vector w is divided by the number of words, and its length says how much the word
counts: "the" can weigh less than "dog". The sum is ColBERT's (Khattab and Zaharia, arXiv 2004.12832, equation 3), of
patches as in FILIP (Yao et al., arXiv 2111.07783). With it the first results of a search are put into a new order."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from miniclip.inference.embed import WORDS, embed_patches, embed_words, positions
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.model import MiniClip
from miniclip.retrieval import RetrievalResult
from miniclip.towers.tokens import has_tokens
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import open_image

RERANKED = 100  # results of a search that are put into a new order


def maxsim(words: Tensor, patches: Tensor) -> Tensor:
    """The sum over words of their largest product with a patch: (n, L, D), zeros for none, and (m, P, D) to (n, m)."""
    n, m = len(words), len(patches)
    used = words.detach().abs().sum(dim=2) > 0  # (n, L)
    products = words[used] @ patches.flatten(0, 1).T  # (all words, m P)
    best = products.view(-1, m, patches.shape[1]).max(dim=2).values
    return best.new_zeros(n, m).index_add(0, used.nonzero()[:, 0], best)


def position_caches(model: MiniClip, preprocess, images: FeatureCache | None, texts: FeatureCache | None) -> tuple:
    """Caches of the features of positions, where there are caches of the features of whole images and texts."""
    folders = [None if cache is None or cache.folder is None else cache.folder.parent for cache in (images, texts)]
    length = positions(model, "visual").visual.length
    return (
        None if images is None else FeatureCache.for_images(folders[0], model, preprocess, positions=length),
        None if texts is None else FeatureCache.for_texts(folders[1], model, positions=WORDS),
    )


class Seen(NamedTuple):
    """A word of a text, and where in an image it is seen: an explanation of MaxSim that costs nothing."""

    word: str
    score: float  # its share of MaxSim: the largest products of its tokens
    heat: np.ndarray  # (side, side) float32: the products with each patch


@torch.inference_mode()
def where_seen(model: MiniClip, preprocess, tokenizer, image, text: str) -> tuple[np.ndarray, list[Seen]]:
    """What a model sees of an image, levels (3, S, S) uint8, and where in it each word of a text. Raises InputError for
    a model without late interaction, ImageError for an image that cannot be read."""
    if not has_tokens(model):
        raise InputError("only a model with late interaction sees words in places: --loss late_interaction")
    model = inference_copy(model, pack=False, fuse=False)
    levels = preprocess.levels(open_image(image, preprocess.scale, preprocess.stored))
    patches = torch.from_numpy(embed_patches(model, preprocess, [image])[0]).float()
    products = (torch.from_numpy(embed_words(model, tokenizer, [text])[0]) @ patches.T).numpy()
    side = math.isqrt(len(patches))
    # A text's tokens are those of its words, one word after the other, behind a start token if there is one.
    ids = tokenizer([text], trim=True)[0].tolist()
    start = int(ids[:1] != tokenizer.encode(text)[:1])
    seen = []
    for word in text.split():
        n = len(tokenizer.encode(word))
        rows = products[start : min(start + n, len(ids), WORDS)]
        start += n
        if len(rows):
            seen.append(Seen(word, float(rows.max(axis=1).sum()), rows.sum(axis=0).reshape(side, side)))
    return levels.numpy(), seen


def reranked(model: MiniClip, n: int | None) -> int:
    """How many results of a query a model re-ranks: `n`, by default 100 or none. Raises InputError if it cannot."""
    if n and not has_tokens(model):
        raise InputError("only a model with late interaction re-ranks: train it with --loss late_interaction")
    return n if n is not None else RERANKED if has_tokens(model) else 0


@torch.inference_mode()
def rerank(results: dict[str, RetrievalResult], words: np.ndarray, patches: np.ndarray, n: int) -> dict:
    """Results of `retrieval.search_both`, of which the first n of each query are in the order of their scores plus
    MaxSim, from the words of all texts and the patches of all images. Nothing else changes its place."""
    words, patches = torch.from_numpy(words), torch.from_numpy(patches)
    ordered = {}
    for way, result in results.items():
        scores = result.scores.copy()
        order = np.tile(np.arange(scores.shape[1]), (len(scores), 1))
        for row, found in enumerate(result.found[:, :n]):
            if way == "text_to_image":
                late = maxsim(words[row : row + 1], patches[found].float())[0]
            else:
                late = maxsim(words[found], patches[row : row + 1].float())[:, 0]
            scores[row, :n] += late.numpy()
            order[row, :n] = np.argsort(-scores[row, :n], kind="stable")
        scores, found, hits = (np.take_along_axis(x, order, axis=1) for x in (scores, result.found, result.hits))
        ranks = np.where(hits[:, :n].any(axis=1), 1 + hits.argmax(axis=1), result.ranks)
        ordered[way] = RetrievalResult(scores, found, hits, ranks, result.relevant)
    return ordered
