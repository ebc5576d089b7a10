"""Late interaction: a second stage that compares words with patches.

    score(image, text) = cosine(image, text) + sum over words w of max over patches p of <w, p>        (MaxSim)

Patches p are unit vectors. A word's vector w is divided by the number of words, and its length says how much the word
counts: "the" can weigh less than "dog". The sum is ColBERT's (Khattab and Zaharia, arXiv 2004.12832, equation 3), of
patches as in FILIP (Yao et al., arXiv 2111.07783). With it the first results of a search are put into a new order.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.model import MiniClip, Tower
from miniclip.retrieval import RetrievalResult
from miniclip.towers.tokens import has_tokens, token_features
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import open_image

WORDS = 32  # positions of a text that count, start and end included: those after them do not
RERANKED = 100  # results of a search that are put into a new order
PIECE = 512  # items whose features are in memory at once


def maxsim(words: Tensor, patches: Tensor) -> Tensor:
    """The sum over words of their largest product with a patch: (n, L, D), in which zeros are no words, and (m, P, D)
    to (n, m)."""
    n, m, used = len(words), len(patches), words.detach().abs().sum(dim=2) > 0  # (n, L)
    products = words[used] @ patches.flatten(0, 1).T  # (all words, m P)
    best = products.view(-1, m, patches.shape[1]).max(dim=2).values
    return best.new_zeros(n, m).index_add(0, used.nonzero()[:, 0], best)


def patch_vectors(tower: Tower, features: Tensor) -> Tensor:
    """Features of patches (B, P, W) to unit vectors (B, P, D)."""
    return F.normalize(tower.token_proj(features.to(tower.token_proj.weight.dtype)), dim=2)


def word_vectors(tower: Tower, features: Tensor) -> Tensor:
    """Features of words (B, L, W), zero where there is none, to vectors (B, L, D)."""
    features = features.to(tower.token_proj.weight.dtype)
    count = (features != 0).any(dim=2).sum(dim=1).clamp_min(1)
    return tower.token_proj(features) / count[:, None, None]


class _Positions(Tower):
    """A tower whose features are those of its first `length` positions, one after the other: (B, length W)."""

    def __init__(self, tower: Tower, length: int):
        super().__init__()
        self.inner, self.length, self.width, self.tokenizer = tower, length, length * tower.width, tower.tokenizer

    def features(self, inputs: Tensor) -> Tensor:
        x = token_features(self.inner, inputs)[:, : self.length]
        return F.pad(x, (0, 0, 0, self.length - x.shape[1])).flatten(1)


def positions(model: MiniClip, name: str) -> InferenceClip:
    """An inference copy of a model in which the features of a tower, "visual" or "text", are those of its positions,
    for `embed_images` or `embed_texts` without projection."""
    twin, length = copy.copy(inference_copy(model)), WORDS
    if name == "visual":
        with twin.inference():
            image = torch.zeros(1, 3, *(twin.visual.image_size,) * 2, dtype=twin.dtype, device=twin.logit_scale.device)
            length = token_features(twin.visual, image).shape[1]
    twin._modules = {**twin._modules, name: _Positions(twin.get_submodule(name), length)}
    return twin


def position_caches(model: MiniClip, preprocess, images: FeatureCache | None, texts: FeatureCache | None) -> tuple:
    """Caches of the features of positions, where there are caches of the features of whole images and texts."""
    folders = [None if cache is None or cache.folder is None else cache.folder.parent for cache in (images, texts)]
    length = positions(model, "visual").visual.length
    return (
        None if images is None else FeatureCache.for_images(folders[0], model, preprocess, positions=length),
        None if texts is None else FeatureCache.for_texts(folders[1], model, positions=WORDS),
    )


def in_pieces(items: Sequence, embed: Callable, finish: Callable[[Tensor], Tensor]) -> np.ndarray:
    """`finish(embed(items))`, a piece at a time: the features of all positions would not fit the memory."""
    pieces = (items[start : start + PIECE] for start in range(0, len(items), PIECE))
    return np.concatenate([finish(torch.from_numpy(embed(piece))).cpu().numpy() for piece in pieces])


@torch.inference_mode()
def embed_patches(model: MiniClip, preprocess, paths: Sequence, **how) -> np.ndarray:
    """The vectors of the patches of n images, (n, P, D) float16, from the top left, row by row. `how`: options of
    `embed_images`."""
    tower, device = model.visual, model.logit_scale.device
    embed = partial(embed_images, positions(model, "visual"), preprocess, project=False, **how)
    return in_pieces(paths, embed, lambda x: patch_vectors(tower, x.to(device).unflatten(1, (-1, tower.width))).half())


@torch.inference_mode()
def embed_words(model: MiniClip, tokenizer, texts: Sequence[str], **how) -> np.ndarray:
    """The vectors of the words of n texts, (n, WORDS, D) float32, zeros behind the end. `how`: options of
    `embed_texts`."""
    embed = partial(embed_texts, positions(model, "text"), tokenizer, project=False, **how)
    tower, device = model.text, model.logit_scale.device
    return in_pieces(texts, embed, lambda x: word_vectors(tower, x.to(device).unflatten(1, (WORDS, -1))))


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
    model = inference_copy(model, pack=False)
    levels = preprocess.levels(open_image(image, preprocess.scale, preprocess.stored))
    patches = torch.from_numpy(embed_patches(model, preprocess, [image])[0]).float()
    vectors = torch.from_numpy(embed_words(model, tokenizer, [text])[0])
    products, side = (vectors @ patches.T).numpy(), math.isqrt(len(patches))
    # A text's tokens are those of its words, one word after the other, behind a start token if there is one.
    ids, words = tokenizer([text], trim=True)[0].tolist(), text.split()
    lengths = [len(tokenizer.encode(word)) for word in words]
    start, seen = int(ids[:1] != tokenizer.encode(text)[:1]), []
    for word, n in zip(words, lengths):
        rows = products[start : min(start + n, len(ids), WORDS)]
        start += n
        if len(rows):
            seen.append(Seen(word, float(rows.max(axis=1).sum()), rows.sum(axis=0).reshape(side, side)))
    return levels.numpy(), seen


def reranked(model: MiniClip, n: int | None) -> int:
    """How many results of a query a model re-ranks, of which `n` are asked for: by default 100, or none if it cannot.
    Raises InputError if it cannot and should."""
    if n and not has_tokens(model):
        raise InputError("only a model with late interaction re-ranks: train it with --loss late_interaction")
    return n if n is not None else RERANKED if has_tokens(model) else 0


@torch.inference_mode()
def rerank(results: dict[str, RetrievalResult], words: np.ndarray, patches: np.ndarray, n: int) -> dict:
    """Results of `retrieval.search_both`, of which the first n of each query are in the order of their scores plus
    MaxSim, from the words of all texts and the patches of all images. Nothing else changes its place."""
    words, patches, ordered = torch.from_numpy(words), torch.from_numpy(patches), {}
    for way, result in results.items():
        scores, order = result.scores.copy(), np.tile(np.arange(result.scores.shape[1]), (len(result.scores), 1))
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
