"""The gallery of the HTML report: the best and the worst queries of both directions, with what they retrieve."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from miniclip.reports.contact_sheet import fill, safe, thumbnail
from miniclip.reports.similarities import Similarities, best_queries, worst_queries
from miniclip.retrieval import TIE

WORST, BEST, SHOWN = 8, 4, 5  # queries of each kind, and results per query
SIDE = 224  # pixels of a thumbnail's longer side
LONGEST = 400  # characters of a caption


def shortened(text: str) -> str:
    return safe(text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "...")


def queries_section(
    results: dict, similar: Similarities, images: Sequence, texts: Sequence[str], image_of_text: np.ndarray
) -> str:
    """The best and the worst queries of both directions, as HTML. `results` are the retrieval results, `images` N paths
    or handles, `texts` M captions."""
    to_image, to_text = results["text_to_image"], results["image_to_text"]
    names = [safe(Path(str(image)).name) for image in images]
    # Of an image's own captions the one that ranks first, as in `retrieval.rank_of_first_relevant`.
    best = np.array([own[np.argmax(similar.right[own] >= similar.right[own].max() - TIE)] for own in to_text.relevant])

    @cache
    def picture(image: int) -> str:
        """An image, or the reason why it cannot be shown."""
        try:
            source = thumbnail(images[image], SIDE)
            return f'<img src="{source}" alt="{names[image]}: {shortened(texts[to_text.relevant[image].min()])}">'
        except (ValueError, OSError) as error:  # ImageError is a ValueError
            return f'<div class="gone">{names[image]}: {safe(str(error).removeprefix(f"{images[image]}: "))}</div>'

    def caption_query(row: int, verdict: str, cells: str) -> str:
        heading = f'<h4 dir="auto">{shortened(texts[row])}</h4>'
        return f'<article>{heading}{verdict}<ol class="pictures">{cells}</ol></article>'

    def image_query(row: int, verdict: str, cells: str) -> str:
        shown = f'<h4>{names[row]}</h4>{verdict}<ol class="sentences">{cells}</ol>'
        return f'<article class="beside">{picture(row)}<div>{shown}</div></article>'

    def image_cell(image: int, rank: str, score: str, mark: str) -> str:
        return f"{picture(image)}<p>{rank}{score}{mark}</p>"

    def text_cell(text: int, rank: str, score: str, mark: str) -> str:
        return f'{rank}<p>{mark} <span dir="auto">{shortened(texts[text])}</span></p>{score}'

    n, m, right = len(images), len(texts), similar.right
    margins = right - similar.wrong_image, right[best] - similar.wrong_text
    of_captions = queries(to_image, n, image_of_text, right, margins[0], image_of_text, caption_query, image_cell)
    of_images = queries(to_text, m, best, right[best], margins[1], np.arange(n), image_query, text_cell)
    return fill("gallery", captions="\n".join(of_captions), images="\n".join(of_images))


def queries(
    result,
    gallery: int,
    own: np.ndarray,
    cosines: np.ndarray,
    margins: np.ndarray,
    image_of_query,
    article,
    cell: Callable,
) -> Iterator[str]:
    """The worst and the best queries of a direction, each as an `article` with a `cell` per result.

    For each query, `own` (Q,) is its correct result, `cosines` (Q,) their cosine and `margins` (Q,) that minus the
    cosine of the best wrong result. `gallery` is the number of candidates.
    """
    worst = worst_queries(result.ranks, margins, image_of_query, WORST)
    best = best_queries(result.ranks, margins, image_of_query, BEST)
    worst_title = "the correct result ranks lowest" if worst else "none, every correct result ranks first"
    best_title = "the correct result leads by most" if best else "none, no correct result ranks first"
    for title, rows in ((f"Worst: {worst_title}", worst), (f"Best: {best_title}", best)):
        yield f"<h3>{title}</h3>"
        for row in rows:
            rank, found = result.ranks[row], zip(result.found[row, :SHOWN], result.scores[row], result.hits[row])
            shown = [(place, *one) for place, one in enumerate(found, 1)]
            shown += [(rank, own[row], cosines[row], True)] if rank > SHOWN else []
            cells = ""
            for place, item, score, correct in shown:
                names = " ".join(["right"] * bool(correct) + ["apart"] * bool(place > SHOWN))  # for the style sheet
                mark = '<span class="yes">✓ correct</span>' if correct else ""
                parts = cell(int(item), f"<b>{place:,}</b>", f"<span>{score:.3f}</span>", mark)
                cells += f'<li class="{names}">{parts}</li>'
            yield article(row, verdict(rank, gallery, margins[row]), cells)


def verdict(rank: int, gallery: int, margin: float) -> str:
    """A query's outcome in words."""
    if rank > 1:
        return f'<p class="verdict">correct result at rank <b>{rank:,}</b> of {gallery:,}</p>'
    lead = f", {max(margin, 0):.3f} ahead of the best wrong one" if math.isfinite(margin) else "; there is no wrong one"
    return f'<p class="verdict">correct result <b>first</b>{lead}</p>'
