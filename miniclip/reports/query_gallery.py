"""The gallery of the HTML report: the best and the worst queries of both directions, with what they retrieve."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from miniclip.reports.contact_sheet import fill, safe, thumbnail
from miniclip.reports.similarities import worst_and_best
from miniclip.retrieval import TIE

WORST, BEST, SHOWN = 8, 4, 5  # queries of each kind, and results per query
SIDE, LONGEST = 224, 400  # pixels of a thumbnail's longer side, characters of a caption


def queries_section(e) -> str:
    """The best and the worst queries of both directions of an `html_page.Evaluation`, as HTML."""
    captions_of_image, right = e.results["image_to_text"].relevant, e.similar.right
    # Of an image's own captions the one that ranks first, as in `retrieval.rank_of_first_relevant`.
    best = np.array([own[np.argmax(right[own] >= right[own].max() - TIE)] for own in captions_of_image])

    def caption(row: int) -> dict[str, str]:
        text = e.texts[row]
        return {"caption": safe(text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "...")}

    @cache
    def image(row: int) -> dict[str, str]:
        """An image, or the reason why it cannot be shown."""
        path, name = e.images[row], safe(Path(str(e.images[row])).name)
        try:
            alt = caption(captions_of_image[row].min())["caption"]
            shown = f'<img src="{thumbnail(path, SIDE)}" alt="{name}: {alt}">'
        except (ValueError, OSError) as error:  # ImageError is a ValueError
            shown = f'<div class="gone">{name}: {safe(str(error).removeprefix(f"{path}: "))}</div>'
        return {"image": shown, "name": name}

    captions = queries(e, "text_to_image", np.arange(len(right)), caption, image)
    return fill(
        "gallery", captions="\n".join(captions), images="\n".join(queries(e, "image_to_text", best, image, caption))
    )


def queries(e, way: str, caption_of_query: np.ndarray, show_query: Callable, show_result: Callable) -> Iterator[str]:
    """The worst and the best queries of a direction. `caption_of_query` (Q,): itself, or an image's best caption."""
    result, similar, image_of_query = e.results[way], e.similar, e.image_of_text[caption_of_query]
    cosines = similar.right[caption_of_query]
    if way == "text_to_image":
        own, margins, gallery = image_of_query, cosines - similar.wrong_image, len(e.images)
    else:
        own, margins, gallery = caption_of_query, cosines - similar.wrong_text, len(e.texts)
    worst, best = worst_and_best(result.ranks, margins, image_of_query, WORST, BEST)
    worst_title = "the correct result ranks lowest" if worst else "none, every correct result ranks first"
    best_title = "the correct result leads by most" if best else "none, no correct result ranks first"
    for title, rows in (f"Worst: {worst_title}", worst), (f"Best: {best_title}", best):
        yield f"<h3>{title}</h3>"
        for row in rows:
            rank, found = result.ranks[row], zip(result.found[row, :SHOWN], result.scores[row], result.hits[row])
            shown = [(place, *one) for place, one in enumerate(found, 1)]
            shown += [(rank, own[row], cosines[row], True)] if rank > SHOWN else []
            results = ""
            for place, item, score, correct in shown:
                classes = " ".join(["right"] * bool(correct) + ["apart"] * bool(place > SHOWN))
                parts = {"classes": classes, "mark": fill("correct") if correct else "", **show_result(int(item))}
                results += fill(f"{way}_result", rank=place, score=score, **parts)
            lead = max(margins[row], 0)
            verdict = "lower" if rank > 1 else "first" if np.isfinite(lead) else "alone"
            verdict = fill(verdict, rank=rank, gallery=gallery, lead=lead)
            yield fill(way, verdict=verdict, results=results, **show_query(row))
