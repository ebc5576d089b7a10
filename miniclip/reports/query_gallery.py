"""The gallery of the HTML report: the best and the worst queries of both directions, with what they retrieve."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from miniclip.reports.contact_sheet import safe, thumbnail
from miniclip.reports.similarities import Similarities, best_queries, worst_queries
from miniclip.retrieval import TIE

WORST, BEST, SHOWN = 8, 4, 5  # queries of each kind, and results per query
SIDE = 224  # pixels of a thumbnail's longer side
LONGEST = 400  # characters of a caption


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "..."


def queries_section(
    results: dict, similar: Similarities, images: Sequence, texts: Sequence[str], image_of_text: np.ndarray
) -> str:
    """The best and the worst queries of both directions, as HTML. `results` are the retrieval results, `images` N paths
    or handles, `texts` M captions."""
    first_text = np.unique(image_of_text, return_index=True)[1]
    names = [safe(Path(str(image)).name) for image in images]

    @cache
    def picture(image: int) -> str:
        """An image, or the reason why it cannot be shown."""
        try:
            about = f"{names[image]}: {safe(shortened(texts[first_text[image]]))}"
            return f'<img src="{thumbnail(images[image], SIDE)}" alt="{about}">'
        except (ValueError, OSError) as error:  # ImageError is a ValueError
            return f'<div class="gone">{names[image]}: {safe(str(error).removeprefix(f"{images[image]}: "))}</div>'

    to_image, to_text = results["text_to_image"], results["image_to_text"]
    of_captions = caption_queries(to_image, similar, picture, texts, image_of_text)
    of_images = image_queries(to_text, similar, picture, texts, names)
    return (
        "<section><h2>Text to image: captions as queries</h2>\n" + "\n".join(of_captions) + "\n</section>\n"
        "<section><h2>Image to text: images as queries</h2>\n" + "\n".join(of_images) + "\n</section>"
    )


def caption_queries(result, similar: Similarities, picture: Callable, texts, image_of_text) -> Iterator[str]:
    """Captions, each with the images it retrieves below."""
    margins = similar.right - similar.wrong_image
    for title, rows in chosen(result.ranks, margins, image_of_text):
        yield f"<h3>{title}</h3>"
        for row in rows:
            own, rank, found = int(image_of_text[row]), result.ranks[row], result.found[row, :SHOWN].tolist()
            cells = [*enumerate(zip(found, result.scores[row]), 1)]
            cells += [] if own in found else [(rank, (own, similar.right[row]))]
            shown = "".join(
                f"<li{kind(image == own, place)}>{picture(image)}<p><b>{place:,}</b><span>{score:.3f}</span>"
                f"{mark(image == own)}</p></li>"
                for place, (image, score) in cells
            )
            yield (
                f'<article><h4 dir="auto">{safe(shortened(texts[row]))}</h4>'
                f'{verdict(rank, len(similar.wrong_text), margins[row])}<ol class="pictures">{shown}</ol></article>'
            )


def image_queries(result, similar: Similarities, picture: Callable, texts, names: list[str]) -> Iterator[str]:
    """Images, each with the captions it retrieves beside it."""
    # Of an image's own captions the one that ranks first, as in `retrieval.rank_of_first_relevant`.
    best = np.array([own[np.argmax(similar.right[own] >= similar.right[own].max() - TIE)] for own in result.relevant])
    margins = similar.right[best] - similar.wrong_text
    for title, rows in chosen(result.ranks, margins, np.arange(len(best))):
        yield f"<h3>{title}</h3>"
        for row in rows:
            rank, own = result.ranks[row], best[row]
            found = zip(result.found[row, :SHOWN].tolist(), result.scores[row], result.hits[row])
            cells = [*enumerate(found, 1)]
            cells += [(rank, (own, similar.right[own], True))] if rank > SHOWN else []
            shown = "".join(
                f'<li{kind(correct, place)}><b>{place:,}</b><p>{mark(correct)} <span dir="auto">'
                f"{safe(shortened(texts[text]))}</span></p><span>{score:.3f}</span></li>"
                for place, (text, score, correct) in cells
            )
            yield (
                f'<article class="beside">{picture(row)}<div><h4>{names[row]}</h4>'
                f'{verdict(rank, len(texts), margins[row])}<ol class="sentences">{shown}</ol></div></article>'
            )


def chosen(ranks: np.ndarray, margins: np.ndarray, image_of_query: np.ndarray) -> Iterator[tuple[str, list[int]]]:
    """Two titles, each with its queries."""
    worst = worst_queries(ranks, margins, image_of_query, WORST)
    best = best_queries(ranks, margins, image_of_query, BEST)
    yield "Worst: the correct result ranks lowest" if worst else "Worst: none, every correct result ranks first", worst
    yield "Best: the correct result leads by most" if best else "Best: none, no correct result ranks first", best


def verdict(rank: int, gallery: int, margin: float) -> str:
    """A query's outcome in words."""
    if rank > 1:
        return f'<p class="verdict">correct result at rank <b>{rank:,}</b> of {gallery:,}</p>'
    lead = f", {max(margin, 0):.3f} ahead of the best wrong one" if math.isfinite(margin) else "; there is no wrong one"
    return f'<p class="verdict">correct result <b>first</b>{lead}</p>'


def mark(correct: bool) -> str:
    return '<span class="yes">✓ correct</span>' if correct else ""


def kind(correct: bool, place: int) -> str:
    """Classes for the style sheet."""
    names = [name for name, so in (("right", correct), ("apart", place > SHOWN)) if so]
    return f' class="{" ".join(names)}"' if names else ""
