"""Which queries went well, which badly, and what did they find? A part of the HTML report."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from html import escape
from pathlib import Path

import numpy as np

from miniclip.reports.contact_sheet import thumbnail
from miniclip.reports.similarities import Similarities, best_queries, worst_queries
from miniclip.retrieval import TIE, Searched

WORST, BEST, SHOWN = 8, 4, 5  # queries of each kind, and answers of each
SIDE = 224  # pixels of a picture's longer side
LONGEST = 400  # letters of a caption


def safe(text) -> str:
    """Any text, as HTML: also one with bytes of a file name that are no UTF-8."""
    return escape(str(text).encode("utf-8", "replace").decode())


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "..."


def queries_section(
    searched: dict[str, Searched],
    alike: Similarities,
    images: Sequence,
    texts: Sequence[str],
    image_of_text: np.ndarray,
) -> str:
    """The best and the worst queries of both directions. `images` are N files or handles, `texts` M captions."""
    first_text = np.unique(image_of_text, return_index=True)[1]

    @cache
    def picture(image: int) -> str:
        """One of the images, or what is wrong with it."""
        file, about = images[image], shortened(texts[first_text[image]])
        name = safe(Path(str(file)).name)
        try:
            return f'<img src="{thumbnail(file, SIDE)}" alt="{name}: {safe(about)}">'
        except (ValueError, OSError) as error:  # ImageError is the former
            return f'<div class="gone">no picture: {name}: {safe(str(error).removeprefix(f"{file}: "))}</div>'

    of_captions = captions_part(searched["text_to_image"], alike, picture, texts, image_of_text)
    of_images = images_part(
        searched["image_to_text"], alike, picture, texts, [Path(str(image)).name for image in images]
    )
    return (
        "<section><h2>Captions looking for their image</h2>\n" + "\n".join(of_captions)
        + "\n</section>\n<section><h2>Images looking for a caption</h2>\n" + "\n".join(of_images) + "\n</section>"
    )  # fmt: skip


def captions_part(searched: Searched, alike: Similarities, picture: Callable, texts, image_of_text) -> Iterator[str]:
    """Captions, and below each the pictures that it finds."""
    margins = alike.right - alike.wrong_image
    for title, rows in chosen(searched.ranks, margins, image_of_text):
        yield f"<h3>{title}</h3>"
        for row in rows:
            own, rank, found = int(image_of_text[row]), searched.ranks[row], searched.found[row, :SHOWN].tolist()
            cells = [
                answer(picture(image), place, score, image == own)
                for place, (image, score) in enumerate(zip(found, searched.scores[row]), 1)
            ]
            if own not in found:
                cells.append(answer(picture(own), rank, alike.right[row], True))
            yield (
                f'<article><h4 dir="auto">{safe(shortened(texts[row]))}</h4>'
                f'{told(rank, len(alike.wrong_text), margins[row])}<ol class="pictures">{"".join(cells)}</ol></article>'
            )


def images_part(searched: Searched, alike: Similarities, picture: Callable, texts, names: list[str]) -> Iterator[str]:
    """Pictures, and beside each the captions that it finds."""
    # Of an image's own captions the one that comes first, as `retrieval.first_ranks` has it.
    best = np.array([own[np.argmax(alike.right[own] >= alike.right[own].max() - TIE)] for own in searched.relevant])
    margins = alike.right[best] - alike.wrong_text
    for title, rows in chosen(searched.ranks, margins, np.arange(len(best))):
        yield f"<h3>{title}</h3>"
        for row in rows:
            rank, found, text = searched.ranks[row], searched.found[row, :SHOWN].tolist(), best[row]
            cells = [
                sentence(texts[caption], place, score, right)
                for place, (caption, score, right) in enumerate(zip(found, searched.scores[row], searched.hits[row]), 1)
            ]
            if rank > SHOWN:
                cells.append(sentence(texts[text], rank, alike.right[text], True))
            yield (
                f'<article class="beside">{picture(row)}<div><h4>{safe(names[row])}</h4>'
                f'{told(rank, len(texts), margins[row])}<ol class="sentences">{"".join(cells)}</ol></div></article>'
            )


def chosen(ranks: np.ndarray, margins: np.ndarray, image_of_query: np.ndarray) -> Iterator[tuple[str, list[int]]]:
    """Two titles, each with the queries below it."""
    worst = worst_queries(ranks, margins, image_of_query, WORST)
    best = best_queries(ranks, margins, image_of_query, BEST)
    yield "Worst: the right answer comes last" if worst else "Worst: none, all find their right answer first", worst
    yield "Best: the right answer leads by most" if best else "Best: none finds its right answer first", best


def told(rank: int, gallery: int, margin: float) -> str:
    """A query's outcome in words."""
    if rank > 1:
        return f'<p class="verdict">right answer at rank <b>{rank:,}</b> of {gallery:,}</p>'
    lead = f", {max(margin, 0):.3f} ahead of the best wrong one" if math.isfinite(margin) else "; there is no wrong one"
    return f'<p class="verdict">right answer <b>first</b>{lead}</p>'


def answer(picture: str, place: int, score: float, right: bool) -> str:
    """A picture found. The right one has a frame, and says so too."""
    mark = '<span class="yes">✓ right</span>' if right else ""
    return f"<li{kind(right, place)}>{picture}<p><b>{place:,}</b><span>{score:.3f}</span>{mark}</p></li>"


def sentence(text: str, place: int, score: float, right: bool) -> str:
    """A caption found, likewise."""
    mark = '<span class="yes">✓ right</span> ' if right else ""
    said = f'<p>{mark}<span dir="auto">{safe(shortened(text))}</span></p>'
    return f"<li{kind(right, place)}><b>{place:,}</b>{said}<span>{score:.3f}</span></li>"


def kind(right: bool, place: int) -> str:
    """For the style sheet."""
    names = [name for name, so in (("right", right), ("apart", place > SHOWN)) if so]
    return f' class="{" ".join(names)}"' if names else ""
