"""The report of an evaluation: the table that is printed, and for `--report DIR` a printable HTML page or a PNG."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from miniclip.reports import similarities
from miniclip.reports.charts import curve, draw_report, histogram_svg, pick_examples, recall_svg, training_svg
from miniclip.reports.contact_sheet import fill, safe, thumbnail, write_page
from miniclip.reports.heat_map import heat_maps
from miniclip.retrieval import KS, TIE
from miniclip.utils.image_files import ImageError

WAYS = {"text_to_image": "text to image", "image_to_text": "image to text"}
WORST, BEST, SHOWN = 8, 4, 5  # queries shown of each kind, and results per query
WRITTEN = 12  # images with the caption that the model writes
SEEN = 3  # captions of each kind whose words are shown in the image
SIDE, LONGEST = 224, 400  # pixels of a thumbnail's longer side, characters of a caption


@dataclass(frozen=True)
class Evaluation:
    """What a report shows, of N images and M captions."""

    model: str  # its folder or name; without a model, the folder of the embeddings
    dataset: str
    images: list  # N paths or ImageFiles
    texts: list[str]  # M captions
    image_embeds: np.ndarray  # (N, E) float32 of unit length
    text_embeds: np.ndarray  # (M, E)
    image_of_text: np.ndarray  # (M,)
    results: dict  # from `retrieval.search_both`
    metrics: dict[str, float]  # from `retrieval.metrics_of`
    metadata: dict  # of the run
    temperature: dict | None = None  # {"scale", "bias" (or None), "start"}; None: evaluated without a model
    notes: tuple[str, ...] = ()  # skipped samples, truncated captions
    seen: Callable | None = None  # (image, text) -> what the model sees (3, S, S) uint8, [(word, score, heat)]
    write: Callable | None = None  # images -> the captions that the model writes

    @cached_property
    def similar(self):
        scale = (self.temperature or {}).get("scale")
        return similarities.similarities(self.image_embeds, self.text_embeds, self.image_of_text, scale)

    def chance(self, way: str) -> np.ndarray:
        """R@K of a random order, for each K."""
        gallery = self.images if way == "text_to_image" else self.texts
        return similarities.chance_curve(len(gallery), np.array([len(right) for right in self.results[way].relevant]))


def format_table(metrics: dict[str, float], ks=KS) -> str:
    """The Recall@K table that train.py and evaluate.py print, in percent, and zero-shot accuracy if it was measured."""
    rows = [("", *(f"R@{k}" for k in ks), "median rank", "mean rank", "MRR")]
    for direction in ("image_to_text", "text_to_image") if "text_to_image_MRR" in metrics else ():
        shares = [f"{100 * metrics[f'{direction}_R@{k}']:.1f}" for k in ks]
        ranks = [f"{metrics[f'{direction}_median_rank']:.0f}", f"{metrics[f'{direction}_mean_rank']:.1f}"]
        rows.append((direction.replace("_", " "), *shares, *ranks, f"{metrics[f'{direction}_MRR']:.3f}"))
    rows, heads = rows if len(rows) > 1 else [], rows[0]
    lines = ["  ".join(cell.rjust(max(7, len(head))) if i else cell.ljust(14)
                       for i, (cell, head) in enumerate(zip(row, heads))) for row in rows]  # fmt: skip
    lines += [f"{name.replace('_', ' ')} {100 * v:.1f}" for name, v in metrics.items() if name.startswith("zero_shot")]
    return "\n".join(lines)


def write_report(path: str | Path, e: Evaluation) -> Path:
    """Writes the report, a .png or .html file or report.html in a folder, and returns its path; with training curves of
    `trainer_state.json` in the model's folder, and reasons in the place of unreadable images. It is reproducible."""
    path = Path(path)
    path = path if path.suffix.lower() in (".png", ".html", ".htm") else path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    log_history, title = read_log_history(e.model), f"{e.model} on {e.dataset}"
    if path.suffix.lower() == ".png":
        examples = pick_examples(e.images, e.texts, e.results["text_to_image"], e.image_of_text)
        draw_report(path, log_history, examples, title)
    else:
        sections = header, metrics_section, recall_section, histogram_section, temperature_section
        body = [*(section(e) for section in sections), training_section(log_history), queries_section(e)]
        body += [written_section(e) if e.write else "", words_section(e) if e.seen else ""]
        write_page(path, title, "\n".join(filter(None, [*body, metadata_section(e.metadata)])))
    return path


def read_log_history(folder: str | Path) -> list[dict]:
    """The Trainer's log in a model's folder; empty where there is none."""
    state = Path(folder) / "trainer_state.json"
    try:
        return json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{state} cannot be read ({error!r}): the report has no training curves")
        return []


def percent(share: float, digits: int = 1) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f}"


def table(head: list[str], rows: list[list[str]], caption: str) -> str:
    """An HTML table with a header row and a header column. Cells are plain text."""
    top = "".join(f'<th scope="col">{safe(cell)}</th>' for cell in head)
    cells = [(safe(name), "".join(f"<td>{safe(cell)}</td>" for cell in others)) for name, *others in rows]
    body = "\n".join(f'<tr><th scope="row">{name}</th>{others}</tr>' for name, others in cells)
    return fill("table", caption=safe(caption), head=top, body=body)


def header(e: Evaluation) -> str:
    tiles = {"mean recall, %": percent(e.metrics["mean_recall"])}
    tiles |= {f"{name} R@1, %": percent(e.metrics[f"{way}_R@1"]) for way, name in WAYS.items()}
    if e.similar.others.sum():
        tiles["ROC AUC, %"] = percent(similarities.roc_auc(e.similar.matching, e.similar.others), 2)
    if e.temperature:
        tiles["temperature"] = f"{1 / e.temperature['scale']:.4f}"
    when = datetime.fromisoformat(e.metadata["started"])
    known = e.metadata | e.metadata.get("versions", {})
    facts = [f"{name} {known[name]}" for name in ("precision", "commit", "python", "torch", "numpy") if known.get(name)]
    measured = [e.metadata.get("machine", {}).get("device"), *facts]
    dataset = [f"{e.dataset}: {len(e.images):,} images, {len(e.texts):,} captions", *e.notes]
    about = {"Model" if e.temperature else "Embeddings": safe(e.model), "Dataset": safe("; ".join(dataset))}
    about["Evaluated"] = safe("; ".join([f"{when.day} {when:%B %Y, %H:%M} UTC", *filter(None, measured)]))
    about["Command"] = f"<code>{safe(e.metadata.get('command', ''))}</code>"
    terms = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in about.items())
    numbers = "".join(f"<li><b>{value}</b> <span>{name}</span></li>" for name, value in tiles.items())
    return fill("header", terms=terms, tiles=numbers)


def metrics_section(e: Evaluation) -> str:
    ks = [int(name.partition("@")[2]) for name in e.metrics if name.startswith("text_to_image_R@")]
    keys = [*(f"R@{k}" for k in ks), "median_rank", "mean_rank", "MRR"]
    rows, found = [], []
    n, m = len(e.images), len(e.texts)
    for (way, name), gallery in zip(WAYS.items(), (n, m)):
        chance = e.chance(way)
        ranks, at = np.arange(1, len(chance) + 1), np.diff(chance, prepend=0)  # at: the share found at each rank
        by_rank = 1 + np.searchsorted(chance, 0.5 - 1e-9), (at * ranks).sum(), (at / ranks).sum()
        rows.append([name, *(e.metrics[f"{way}_{key}"] for key in keys)])
        rows.append(["by chance", *(chance[min(k, len(chance)) - 1] for k in ks), *by_rank])
        correct = np.mean([len(right) for right in e.results[way].relevant])
        by_chance = [min(k, gallery) / gallery for k in ks]
        found.append([name, *(e.metrics[f"{way}_{kind}@{k}"] for kind in ("recall", "precision") for k in ks)])
        found.append(["by chance", *by_chance, *(share * correct / k for share, k in zip(by_chance, ks))])
    rows = [[name, *map(percent, recalls), f"{median:,.0f}", f"{mean:,.1f}", f"{mrr:.3f}"]
            for name, *recalls, median, mean, mrr in rows]  # fmt: skip
    columns = ["", *(key.replace("_", " ") for key in keys)]
    shown = table(columns, rows, "R@K: share of queries with a correct result among the first K, in percent")
    counted = "Correct results among the first K, in percent of all correct ones (recall@K) and of K (precision@K)"
    columns = ["", *(f"{kind}@{k}" for kind in ("recall", "precision") for k in ks)]
    counts = table(columns, [[name, *map(percent, shares)] for name, *shares in found], counted)
    several = fill("several", each=m / n) if m > n else ""
    return fill("metrics", table=shown, counts=counts, images=n, texts=m, several=several, tie=TIE)


def depths(longest: int) -> list[int]:
    """1, 5, 10, 50, 100, ... below `longest`, then `longest`."""
    return [n for power in range(len(str(longest))) for k in (1, 5) if (n := k * 10**power) < longest] + [longest]


def recall_section(e: Evaluation) -> str:
    chances = [e.chance(way) for way in WAYS]
    recalls = [similarities.recall_curve(e.results[w].ranks, np.arange(1, len(c) + 1)) for w, c in zip(WAYS, chances)]
    words = ", ".join(f"{name} R@1 {percent(recall[0])}" for name, recall in zip(WAYS.values(), recalls))
    chart = recall_svg(dict(zip(WAYS.values(), recalls)), chances, f"Both curves rise to 100%: {words}.")
    columns = [recalls[0], chances[0], recalls[1], chances[1]]
    ks = depths(max(map(len, columns)))
    rows = [[f"{k:,}", *(percent(column[min(k, len(column)) - 1]) for column in columns)] for k in ks]
    shown = table(["K", "text to image", "chance", "image to text", "chance"], rows, "R@K in percent")
    return fill("recall", chart=chart, table=shown)


def histogram_section(e: Evaluation) -> str:
    counts, (mean, other_mean) = (e.similar.matching, e.similar.others), e.similar.means
    n, others = (int(count.sum()) for count in counts)
    used = np.flatnonzero(sum(counts))
    bars = min(60, max(10, round(2 * n**0.5)))  # at most: with few pairs, narrow bars would hold one or none
    widths = (1, 2, 5, 10, 20, 40, 100, 200)  # of a bar, in bins
    width = next(width for width in widths if used[-1] // width - used[0] // width < bars)
    start, stop = used[0] // width, used[-1] // width + 1
    shares = [np.add.reduceat(c, np.arange(0, similarities.BINS, width))[start:stop] / max(1, c.sum()) for c in counts]
    about, said = f"The mean of matching pairs is {mean:.3f}", ". There are no other pairs."
    if others:
        about += f", that of others {other_mean:.3f}"
        auc, common = similarities.roc_auc(*counts), similarities.overlap(*shares)  # of the bars: most bins are empty
        said = fill("others", others=others, mean=other_mean, bin=2 / similarities.BINS, auc=auc, overlap=common)
    named = {f"{n:,} matching pairs": shares[0], f"{others:,} other pairs": shares[1]}
    edges = width * np.arange(start, stop + 1) * 2 / similarities.BINS - 1
    return fill("pairs", chart=histogram_svg(edges, named, e.similar.means, f"{about}."), n=n, mean=mean, others=said)


def temperature_section(e: Evaluation) -> str:
    if e.temperature is None:
        return fill("none")
    scale, bias, start = (e.temperature[name] for name in ("scale", "bias", "start"))
    similar, n, values = e.similar, len(e.images), {"this model": scale, "before training": start}
    if bias is None:
        values["limit in training"] = 100
        about = {"right": similar.p_right.mean(), "first": similar.p_first.mean(), "images": n, "chance": 1 / n}
        about["recall"] = e.metrics["text_to_image_R@1"]
    else:  # SigLIP: each pair is decided by itself
        middles = (np.arange(similarities.BINS) + 0.5) * 2 / similarities.BINS - 1
        yes, no = (1 / (1 + np.exp(-scale * x - bias)) for x in (similar.right.astype(float), middles))
        wrong = (similar.others * no).sum() / max(1, similar.others.sum())
        about = {"bias": bias, "border": -bias / scale, "wrong": wrong}
        about |= {"right": yes.mean(), "above": (yes > 0.5).mean()}
    rows = [[name, f"{1 / value:.4f}", f"{value:.2f}"] for name, value in values.items()]
    rows += [] if bias is None else [["bias", "", f"{bias:.2f}"]]
    shown = table(["", "temperature", "logit scale"], rows, "The temperature is 1 / logit scale")
    words = fill("softmax" if bias is None else "sigmoid", scale=scale, temperature=1 / scale, **about)
    return fill("temperature", table=shown, about=words)


def training_section(log_history: list[dict]) -> str:
    recalls = {name: curve(log_history, f"eval_{way}_R@1") for way, name in WAYS.items()}
    loss, figures = {"loss": curve(log_history, "loss")}, ""
    for title, curves, share in ("Training loss", loss, False), ("R@1 over training", recalls, True):
        if curves := {name: points for name, points in curves.items() if len(points) > 1}:
            figures += f"<figure><h3>{title}</h3>{training_svg(title, curves, share)}</figure>"
    note = fill("note") if max(map(len, recalls.values())) > 1 else ""
    return fill("training", figures=figures, note=note) if figures else ""


def shortened(text: str) -> str:
    """A caption as HTML, cut if it is very long."""
    return safe(text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "...")


def queries_section(e: Evaluation) -> str:
    """The best and the worst queries of both directions, with what they retrieve."""
    captions_of_image, right = e.results["image_to_text"].relevant, e.similar.right
    # Of an image's own captions the one that ranks first, as in `retrieval.rank_of_first_relevant`.
    best = np.array([own[np.argmax(right[own] >= right[own].max() - TIE)] for own in captions_of_image])

    def caption(row: int) -> dict[str, str]:
        return {"caption": shortened(e.texts[row])}

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
    images = queries(e, "image_to_text", best, image, caption)
    return fill("gallery", captions="\n".join(captions), images="\n".join(images))


def queries(e: Evaluation, way: str, caption_of_query: np.ndarray, show_query, show_result) -> Iterator[str]:
    """The worst and the best queries of a direction. `caption_of_query` (Q,): itself, or an image's best caption."""
    result, similar, image_of_query = e.results[way], e.similar, e.image_of_text[caption_of_query]
    cosines = similar.right[caption_of_query]
    if way == "text_to_image":
        own, margins, gallery = image_of_query, cosines - similar.wrong_image, len(e.images)
    else:
        own, margins, gallery = caption_of_query, cosines - similar.wrong_text, len(e.texts)
    worst, best = similarities.worst_and_best(result.ranks, margins, image_of_query, WORST, BEST)
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


def written_section(e: Evaluation) -> str:
    """What the model writes of some images, from the first to the last, and what the data set says of them."""
    pictures, n = {}, len(e.images)
    for row in dict.fromkeys(np.linspace(0, n - 1, WRITTEN).round().astype(int).tolist()):
        with suppress(ImageError):  # the note below says how many are shown
            pictures[row] = thumbnail(e.images[row], SIDE)
    cells = []
    for (row, url), text in zip(pictures.items(), e.write([e.images[row] for row in pictures])):
        own = np.flatnonzero(e.image_of_text == row)
        given = [e.texts[m] for m in own[:SHOWN]] + [f"and {len(own) - SHOWN} more"] * (len(own) > SHOWN)
        given = "".join(fill("given", caption=shortened(one)) for one in given)
        name = safe(Path(str(e.images[row])).name)
        cells.append(fill("one", url=url, name=name, caption=shortened(text), given=given))
    return fill("written", n=len(cells), images=n, cells="\n".join(cells)) if cells else ""


def words_section(e: Evaluation) -> str:
    """Where the words of some captions are seen in their images: of the worst and the best queries."""
    ranks, rows = e.results["text_to_image"].ranks, []
    margins = e.similar.right - e.similar.wrong_image
    worst, best = similarities.worst_and_best(ranks, margins, e.image_of_text, SEEN, SEEN)
    for row in best + worst:
        with suppress(ImageError):  # an image that cannot be read is shown above, with the reason
            levels, words = e.seen(e.images[e.image_of_text[row]], e.texts[row])
            urls = heat_maps(levels, [heat for _, _, heat in words])
            maps = (fill("word", url=url, word=safe(word), score=score) for url, (word, score, _) in zip(urls, words))
            rows.append(fill("seen", caption=safe(e.texts[row]), rank=ranks[row], words="\n".join(maps)))
    return fill("words", captions="\n".join(rows))


def metadata_section(metadata: dict) -> str:
    def lines(value, name: str = ""):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from lines(inner, f"{name} {key}".strip())
        elif value is not None and value is not False and value not in ([], ""):
            yield f'<tr><th scope="row">{safe(name)}</th><td>{safe(value)}</td></tr>'

    return fill("metadata", rows="".join(lines(metadata)))
