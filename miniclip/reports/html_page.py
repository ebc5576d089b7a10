"""The report of an evaluation: one self-contained, printable HTML page, or a PNG.

The page has the metrics, recall curves, the best and worst queries with their images, the cosines of matching and
other pairs, the temperature, and the training curves. `evaluate.py --report DIR` writes it.
"""

import json
import math
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from miniclip.reports.charts import curve, draw_report, histogram_svg, pick_examples, recall_svg, training_svg
from miniclip.reports.contact_sheet import fill, safe, write_page
from miniclip.reports.query_gallery import queries_section
from miniclip.reports.similarities import BINS, chance_curve, overlap, recall_curve, roc_auc, similarities
from miniclip.retrieval import TIE
from miniclip.utils.errors import InputError

WAYS = ("text_to_image", "image_to_text")
NAME = "report.html"


@dataclass(frozen=True)
class Evaluation:
    """What a report shows, of N images and M captions."""

    model: str  # its folder or name; without a model, the folder of the embeddings
    dataset: str
    records: list[dict]  # N, with the keys image (a path or handle) and caption (a list)
    image_embeds: np.ndarray  # (N, E) float32 of unit length
    text_embeds: np.ndarray  # (M, E): all captions of each record, or its first ones
    image_of_text: np.ndarray  # (M,)
    results: dict  # retrieval result of each direction, from `retrieval.search_both`
    metrics: dict[str, float]  # from `retrieval.metrics_of`
    metadata: dict  # run metadata
    temperature: dict | None = None  # {"scale", "bias" (or None), "start"}; None: evaluated without a model
    notes: tuple[str, ...] = ()  # skipped samples, truncated captions

    @cached_property
    def images(self) -> list:
        return [record["image"] for record in self.records]

    @cached_property
    def texts(self) -> list[str]:
        counts = np.bincount(self.image_of_text, minlength=len(self.records))
        return [text for record, n in zip(self.records, counts) for text in record["caption"][:n]]

    @cached_property
    def similar(self):
        scale = self.temperature and self.temperature["scale"]
        return similarities(self.image_embeds, self.text_embeds, self.image_of_text, scale)

    def chance(self, way: str) -> np.ndarray:
        """R@K of a random order, for each K."""
        gallery = len(self.image_embeds) if way == "text_to_image" else len(self.text_embeds)
        return chance_curve(gallery, np.array([len(right) for right in self.results[way].relevant]))


def report_file(name: str | Path) -> Path:
    """The file that a report goes to: `name` if it ends in .png or .html, otherwise report.html in that folder. Raises
    InputError where `name` is a file of another kind."""
    path = Path(name)
    if path.suffix.lower() in (".png", ".html", ".htm"):
        return path
    if path.is_file():
        raise InputError(f"--report takes a folder, or a name that ends in .html or .png: {name} is a file")
    return path / NAME


def write_report(path: str | Path, e: Evaluation) -> Path:
    """Writes the report, as PNG or HTML by its name (`report_file`), and returns the file's path.

    Training curves come from `trainer_state.json` in the model's folder, if there is one. An image that cannot be read
    is replaced by the reason. The same input gives the same bytes: the date is that of the metadata.
    """
    path = report_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    log_history, title = read_log_history(e.model), f"{e.model} on {e.dataset}"
    if path.suffix.lower() == ".png":
        examples = pick_examples(e.images, e.texts, e.results["text_to_image"], e.image_of_text)
        draw_report(path, log_history, examples, title)
        return path
    sections = [part(e) for part in (header, metrics_section, recall_section, histogram_section, temperature_section)]
    gallery = queries_section(e.results, e.similar, e.images, e.texts, e.image_of_text)
    sections += [training_section(log_history), gallery, metadata_section(e.metadata)]
    write_page(path, title, "\n".join(filter(None, sections)))
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
    body = "\n".join(
        f'<tr><th scope="row">{safe(row[0])}</th>{"".join(f"<td>{safe(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f"<table><caption>{safe(caption)}</caption><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"


def header(e: Evaluation) -> str:
    """Title, model, data, date, command and the most important numbers."""
    tiles = [(percent(e.metrics[f"{way}_R@1"]), f"{way.replace('_', ' ')} R@1, %") for way in WAYS]
    tiles.insert(0, (percent(e.metrics["mean_recall"]), "mean recall, %"))
    if e.similar.others.sum():
        tiles.append((percent(roc_auc(e.similar.matching, e.similar.others), 2), "ROC AUC, %"))
    if e.temperature:
        tiles.append((f"{1 / e.temperature['scale']:.4f}", "temperature"))
    when = datetime.fromisoformat(e.metadata["started"])
    options, versions, machine = (e.metadata.get(name, {}) for name in ("options", "versions", "machine"))
    measured = [f"{when.day} {when:%B %Y, %H:%M} UTC", machine.get("device")]
    measured += [f"precision {options['precision']}"] if e.temperature and "precision" in options else []
    measured += [f"commit {e.metadata['commit']}"] if e.metadata.get("commit") else []
    measured += [f"{name} {versions[name]}" for name in ("python", "torch", "numpy") if versions.get(name)]
    dataset = [f"{e.dataset}: {len(e.images):,} images, {len(e.texts):,} captions", *e.notes]
    about = {
        "Model" if e.temperature else "Embeddings": safe(e.model), "Dataset": safe("; ".join(dataset)),
        "Evaluated": safe("; ".join(filter(None, measured))),
        "Command": f"<code>{safe(e.metadata.get('command', ''))}</code>",
    }  # fmt: skip
    terms = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in about.items())
    return fill("header", terms=terms, tiles="".join(f"<li><b>{x}</b> <span>{name}</span></li>" for x, name in tiles))


def metrics_section(e: Evaluation) -> str:
    """The metrics of both directions, each with what chance would reach."""
    ks = [int(name.partition("@")[2]) for name in e.metrics if name.startswith("text_to_image_R@")]
    rows = []
    for way in WAYS:
        values = [percent(e.metrics[f"{way}_R@{k}"]) for k in ks]
        values += [f"{e.metrics[f'{way}_median_rank']:,.0f}", f"{e.metrics[f'{way}_mean_rank']:,.1f}"]
        rows.append([way.replace("_", " "), *values, f"{e.metrics[f'{way}_MRR']:.3f}"])
        chance = e.chance(way)
        ranks, at = np.arange(1, len(chance) + 1), np.diff(chance, prepend=0)  # at: the share found at each rank
        values = [percent(chance[min(k, len(chance)) - 1]) for k in ks]
        values += [f"{1 + np.searchsorted(chance, 0.5 - 1e-9):,}", f"{(at * ranks).sum():,.1f}"]
        rows.append(["by chance", *values, f"{(at / ranks).sum():.3f}"])
    columns = ["", *(f"R@{k}" for k in ks), "median rank", "mean rank", "MRR"]
    shown = table(columns, rows, "R@K: share of queries with a correct result among the first K, in percent")
    n, m = len(e.images), len(e.texts)
    several = fill("several", each=m / n) if m > n else ""
    return fill("metrics", table=shown, images=n, texts=m, several=several, tie=TIE)


def depths(longest: int) -> list[int]:
    """1, 5, 10, 50, 100, ... below `longest`, then `longest`."""
    marks = [k * 10**power for power in range(len(str(longest))) for k in (1, 5)]
    return [k for k in marks if k < longest] + [longest]


def recall_section(e: Evaluation) -> str:
    """Recall@K of both directions for every K, as a chart and a table."""
    curves, chances = {}, [e.chance(way) for way in WAYS]
    for way, chance in zip(WAYS, chances):
        curves[way.replace("_", " ")] = recall_curve(e.results[way].ranks, np.arange(1, len(chance) + 1))
    words = ", ".join(f"{name} R@1 {percent(values[0])}" for name, values in curves.items())
    chart = recall_svg(curves, chances, f"Both curves rise to 100%: {words}.")
    columns = [column for pair in zip(curves.values(), chances) for column in pair]
    ks = depths(max(map(len, columns)))
    rows = [[f"{k:,}", *(percent(column[min(k, len(column)) - 1]) for column in columns)] for k in ks]
    shown = table(["K", "text to image", "chance", "image to text", "chance"], rows, "Recall@K in percent")
    return fill("recall", chart=chart, table=shown)


def histogram_section(e: Evaluation) -> str:
    """The cosines of matching pairs and of all others."""
    matching, others, (mean, other_mean) = e.similar.matching, e.similar.others, e.similar.means
    used = np.flatnonzero(matching + others)
    first, last = int(used[0]), int(used[-1])
    n, of_others = int(matching.sum()), int(others.sum())
    bars = min(60, max(10, round(2 * n**0.5)))  # at most: with few pairs, narrow bars would hold one or none
    widths = (1, 2, 5, 10, 20, 40, 100, 200)  # of a bar, in bins
    fine = next(width for width in widths if last // width - first // width < bars)
    start, stop = first // fine, last // fine + 1
    shares = [
        np.add.reduceat(counts, np.arange(0, BINS, fine))[start:stop] / max(1, counts.sum())
        for counts in (matching, others)
    ]
    said = ". There are no other pairs."
    if of_others:
        measured = {"auc": roc_auc(matching, others), "overlap": overlap(*shares)}  # of the bars: most bins are empty
        said = fill("others", others=of_others, mean=other_mean, bin=2 / BINS, **measured)
    about = f"The mean of matching pairs is {mean:.3f}" + (f", that of others {other_mean:.3f}." if of_others else ".")
    names = f"{n:,} matching pairs", f"{of_others:,} other pairs"
    edges = fine * np.arange(start, stop + 1) * 2 / BINS - 1
    chart = histogram_svg(edges, dict(zip(names, shares)), e.similar.means, about)
    return fill("pairs", chart=chart, n=n, mean=mean, others=said)


def temperature_section(e: Evaluation) -> str:
    """The learned temperature, and the probabilities it turns the cosines into."""
    if e.temperature is None:
        return fill("none")
    scale, bias, start = (e.temperature[name] for name in ("scale", "bias", "start"))
    rows = [["this model", f"{1 / scale:.4f}", f"{scale:.2f}"], ["before training", f"{1 / start:.4f}", f"{start:.2f}"]]
    about = {"scale": scale, "temperature": 1 / scale}
    if bias is None:
        rows.append(["limit in training", "0.0100", "100.00"])
        about |= {"right": e.similar.p_right.mean(), "first": e.similar.p_first.mean(), "images": len(e.images)}
        text = fill("softmax", chance=1 / len(e.images), recall=e.metrics["text_to_image_R@1"], **about)
    else:  # SigLIP: each pair is decided by itself
        rows.append(["bias", "", f"{bias:.2f}"])
        middles = (np.arange(BINS) + 0.5) * 2 / BINS - 1
        yes, no = (1 / (1 + np.exp(-scale * x - bias)) for x in (e.similar.right.astype(float), middles))
        wrong = (e.similar.others * no).sum() / max(1, e.similar.others.sum())
        about |= {"bias": bias, "border": -bias / scale, "right": yes.mean(), "above": (yes > 0.5).mean()}
        text = fill("sigmoid", wrong=wrong, **about)
    shown = table(["", "temperature", "logit scale"], rows, "The temperature is 1 / logit scale")
    return fill("temperature", table=shown, about=text)


def training_section(log_history: list[dict]) -> str:
    """Loss and recall over training, where they were logged."""
    recalls = {way.replace("_", " "): curve(log_history, f"eval_{way}_R@1") for way in WAYS}
    figures = []
    for title, curves, share in (
        ("Training loss", {"loss": curve(log_history, "loss")}, False),
        ("Recall@1 over training", recalls, True),
    ):
        curves = {name: points for name, points in curves.items() if len(points) > 1}
        if curves:
            figures.append(f"<figure><h3>{title}</h3>{training_svg(title, curves, share)}</figure>")
    note = fill("note") if max(map(len, recalls.values())) > 1 else ""
    return fill("training", figures="".join(figures), note=note) if figures else ""


def metadata_section(metadata: dict) -> str:
    """All run metadata, folded; not printed."""

    def lines(value, name: str = ""):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from lines(inner, f"{name} {key}".strip())
        elif value is not None and value is not False and value not in ([], ""):
            yield f'<tr><th scope="row">{safe(name)}</th><td>{safe(value)}</td></tr>'

    return fill("metadata", rows="".join(lines(metadata)))
