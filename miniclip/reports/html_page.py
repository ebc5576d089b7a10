"""How good is this model, and where does it fail? One HTML page that needs no other file and no network, and prints.

`evaluate.py --report DIR` writes it: metrics, recall at every depth, the queries that went best and worst with their
pictures, how cosines of pairs that match differ from those of others, the temperature, and how training went.
"""

import math
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from miniclip.reports.charts import curve, ticks
from miniclip.reports.query_gallery import queries_section, safe
from miniclip.reports.similarities import BINS, Similarities, chance_curve, ordered_right, overlap, recall_curve
from miniclip.reports.svg import HATCHING, Chart, legend
from miniclip.retrieval import TIE, Searched
from miniclip.utils.files import write_text

WAYS = {"text_to_image": "captions finding their image", "image_to_text": "images finding a caption"}
NAME = "report.html"
STYLE = Path(__file__).with_name("report.css")


class Measured(NamedTuple):
    """What the page tells about."""

    model: str  # or the folder with the vectors
    dataset: str
    metrics: dict[str, float]  # as `retrieval.metrics_of` gives them, for `ks`
    ks: tuple[int, ...]
    searched: dict[str, Searched]
    alike: Similarities
    images: list  # N files or handles
    texts: list[str]  # M captions
    image_of_text: np.ndarray
    record: dict  # `metadata.evaluation_metadata`
    temperature: dict | None = None  # {"scale", "bias" or None, "start"}; None: measured without a model
    log_history: list[dict] = []  # of the Trainer
    left_out: tuple[str, ...] = ()  # what was not measured, or not whole, in words


def report_file(name: str | Path) -> Path:
    """Where `--report` writes: the .png or .html that it names, or else report.html in that folder."""
    path = Path(name)
    return path if path.suffix.lower() in (".png", ".html", ".htm") else path / NAME


def write_report(path: str | Path, m: Measured):
    """Writes the page. A picture that cannot be read leaves a text in its place. The same input gives the same bytes:
    the date is the record's."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [head(m), metrics_table(m), recall_section(m), histogram_section(m), temperature_section(m)]
    parts.append(training_section(m.log_history))
    parts.append(queries_section(m.searched, m.alike, m.images, m.texts, m.image_of_text))
    parts.append(record_section(m.record))
    page = PAGE.format(title=safe(f"{m.model} on {m.dataset}"), style=STYLE.read_text(encoding="utf-8"))
    write_text(path, page + "\n".join(filter(None, parts)) + "\n</main></body></html>\n")


def percent(share: float, digits: int = 1) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f}"


def table(head: list[str], rows: list[list[str]], caption: str) -> str:
    """A table of numbers whose first column and first line say what they are of. Cells are text, not HTML."""
    top = "".join(f'<th scope="col">{safe(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{safe(row[0])}</th>{"".join(f"<td>{safe(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f"<table><caption>{safe(caption)}</caption><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"


def head(m: Measured) -> str:
    """Title, the most important numbers, when, with what, and the command that repeats it."""
    when = datetime.fromisoformat(m.record["started"])
    tiles = [
        (percent(m.metrics["mean_recall"]), "mean recall, %"),
        (percent(m.metrics["text_to_image_R@1"]), "text to image R@1, %"),
        (percent(m.metrics["image_to_text_R@1"]), "image to text R@1, %"),
    ]
    if m.alike.others.sum():
        tiles.append((percent(ordered_right(m.alike.matching, m.alike.others), 2), "pairs ordered right, %"))
    if m.temperature:
        tiles.append((f"{1 / m.temperature['scale']:.4f}", "temperature"))
    tiles = "".join(f"<li><b>{value}</b> <span>{name}</span></li>" for value, name in tiles)
    options, versions, machine = (m.record.get(name, {}) for name in ("options", "versions", "machine"))
    measured = [f"{when.day} {when:%B %Y, %H:%M} UTC", machine.get("device")]
    measured += [f"precision {options['precision']}"] if m.temperature and "precision" in options else []
    measured += [f"commit {m.record['commit']}"] if m.record.get("commit") else []
    measured += [f"{name} {versions[name]}" for name in ("python", "torch", "numpy") if versions.get(name)]
    measured_on = [f"{m.dataset}: {len(m.images):,} images, {len(m.texts):,} captions", *m.left_out]
    about = [
        ("Model" if m.temperature else "Vectors", safe(m.model)),
        ("Data set", safe("; ".join(measured_on))),
        ("Measured", safe("; ".join(filter(None, measured)))),
        ("Again", f"<code>{safe(m.record.get('command', ''))}</code>"),
    ]
    about = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in about)
    title = "Which picture belongs to which sentence?"
    return f'<header><h1>{title}</h1>\n<dl>{about}</dl>\n<ul class="tiles">{tiles}</ul></header>'


def metrics_table(m: Measured) -> str:
    """Both directions, each with what chance would give."""
    rows = []
    for way in WAYS:
        values = [percent(m.metrics[f"{way}_R@{k}"]) for k in m.ks]
        values += [f"{m.metrics[f'{way}_median_rank']:,.0f}", f"{m.metrics[f'{way}_mean_rank']:,.1f}"]
        rows.append([way.replace("_", " "), *values, f"{m.metrics[f'{way}_MRR']:.3f}"])
        chance = chance_of(m, way)
        ranks, at = np.arange(1, len(chance) + 1), np.diff(chance, prepend=0)  # at: the share found at each rank
        values = [percent(chance[min(k, len(chance)) - 1]) for k in m.ks]
        values += [f"{1 + np.searchsorted(chance, 0.5 - 1e-9):,}", f"{(at * ranks).sum():,.1f}"]
        rows.append(["by chance", *values, f"{(at / ranks).sum():.3f}"])
    columns = ["", *(f"R@{k}" for k in m.ks), "median rank", "mean rank", "MRR"]
    shown = table(columns, rows, "R@K: share of queries whose right answer is among the first K, in percent")
    each = len(m.texts) / len(m.images)
    several = f"An image has {each:.3g} captions on average and counts as found when any of them is."
    return f"""<section><h2>Metrics</h2>
<div class="wide">{shown}</div>
<p class="note">Every caption searches all {len(m.images):,} images, every image all {len(m.texts):,} captions.
{several if each > 1 else ""} Only an image’s own captions are right, also where another’s would fit. Among equal
cosines (closer than {TIE:g}) the earlier row comes first: a model to which all is alike scores no better than chance.
Ranks are those of the first right answer, 1 is best; MRR is the mean of 1 / rank; mean recall is the mean of R@1, R@5
and R@10 in both directions.</p></section>"""


def chance_of(m: Measured, way: str) -> np.ndarray:
    gallery = len(m.images) if way == "text_to_image" else len(m.texts)
    return chance_curve(gallery, np.array([len(right) for right in m.searched[way].relevant]))


def depths(longest: int) -> list[int]:
    """1, 5, 10, 50, 100, ... up to the last one below `longest`, and that."""
    marks = [k * 10**power for power in range(len(str(longest))) for k in (1, 5)]
    return [k for k in marks if k < longest] + [longest]


def recall_section(m: Measured) -> str:
    """Recall@K of both directions for every K, as a chart and as numbers."""
    longest, style = max(len(m.images), len(m.texts)), {"text_to_image": "a", "image_to_text": "b"}
    words = ", ".join(f"{way.replace('_', ' ')} R@1 {percent(m.metrics[f'{way}_R@1'])}" for way in WAYS)
    across, up = lambda k: math.log(k) / math.log(max(longest, 2)), float  # a logarithmic axis
    chart = Chart("Recall@K for every K, in percent", f"Both curves rise to 100%: {words}.", across, up)
    marks = [k * 10**n for n in range(len(str(longest))) for k in ((1, 2, 5) if longest < 100 else (1,))]
    x_ticks, y_ticks = {k: f"{k:,}" for k in marks if k <= longest}, {n / 5: f"{20 * n}%" for n in range(6)}
    chart.axes(x_ticks, y_ticks, "K: answers looked at")
    columns = {}
    for way, series in style.items():
        chance, ranks = chance_of(m, way), m.searched[way].ranks
        ks = np.unique(np.geomspace(1, len(chance), 150).round().astype(int))
        chart.line("c", list(zip(ks.tolist(), chance[ks - 1])))
        marked = [k for k in (1, 5, 10) if k <= len(chance)]
        points, marks = (list(zip(at, recall_curve(ranks, at))) for at in (ks.tolist(), marked))
        chart.line(series, points, marks)
        columns[way] = [percent(share) for share in recall_curve(ranks, depths(longest))]
        columns[f"{way} chance"] = [percent(chance[min(k, len(chance)) - 1]) for k in depths(longest)]
    rows = [[f"{k:,}", *values] for k, *values in zip(depths(longest), *columns.values())]
    head = ["K", "text to image", "chance", "image to text", "chance"]
    return f"""<section><h2>Recall curves</h2><div class="pair">
<figure>{chart}{legend({"a": WAYS["text_to_image"], "b": WAYS["image_to_text"], "c": "by chance"})}</figure>
{table(head, rows, "Recall@K in percent")}</div></section>"""


def histogram_section(m: Measured) -> str:
    """The cosines of matching pairs against those of all others."""
    matching, others = m.alike.matching, m.alike.others
    used = np.flatnonzero(matching + others)
    first, last = int(used[0]), int(used[-1])
    n, of_others = int(matching.sum()), int(others.sum())
    bars = min(60, max(10, round(2 * n**0.5)))  # at most: of few pairs each would have one or none
    widths = (1, 2, 5, 10, 20, 40, 100, 200)  # of a bar, in bins
    fine = next(width for width in widths if last // width - first // width < bars)
    start, stop = first // fine, last // fine + 1
    edges = [fine * bar * 2 / BINS - 1 for bar in range(start, stop + 1)]
    shares = [
        np.add.reduceat(counts, np.arange(0, BINS, fine))[start:stop] / max(1, counts.sum())
        for counts in (matching, others)
    ]
    mean, other_mean = m.alike.means
    said = f"<p>{n:,} matching pairs (each caption with its image) have a mean cosine of <b>{mean:.3f}</b>"
    if of_others:
        auc, common = ordered_right(matching, others), overlap(*shares)  # of the bars: bins are nearly empty
        said += (
            f", {of_others:,} others (all remaining pairs) one of <b>{other_mean:.3f}</b>. Of a matching pair and"
            f" another, the matching one has the higher cosine in <b>{percent(auc, 2)}%</b> of cases (the area under"
            f" the ROC curve; 50% is chance), counted in bins of {2 / BINS:g}, of all pairs. The two histograms, as"
            f" they are drawn, share {percent(common)}% of their area.</p>"
        )
    else:
        said += ". There are no others.</p>"
    low, high = edges[0], edges[-1]
    y_ticks = ticks(max(share.max() for share in shares))
    top = y_ticks[-1]
    about = f"The mean of matching pairs is {mean:.3f}" + (f", that of others {other_mean:.3f}." if of_others else ".")
    chart = Chart("Cosines of matching pairs and of others", about,
                  lambda cosine: (cosine - low) / (high - low), lambda share: share / top)  # fmt: skip
    steps = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    step = next(step for step in steps if (high - low) / step <= 6)
    marks = [step * i for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]
    x_ticks, y_ticks = {mark: f"{mark:.3g}" for mark in marks}, {share: f"{100 * share:.3g}%" for share in y_ticks}
    chart.axes(x_ticks, y_ticks, f"cosine, in bars of {fine * 2 / BINS:g}")
    for series, counts, average in (("b", shares[1], other_mean), ("a", shares[0], mean)):
        if counts.any():
            chart.area(series, edges, counts)
            chart.upright(series, average)
    names = {"a": f"{n:,} matching pairs", "b": f"{of_others:,} others"}
    return f"""<section><h2>Matching and other pairs</h2>{HATCHING}<div class="pair">
<figure>{chart}{legend(names, area=True)}<figcaption>Share of each kind’s pairs in a bar; upright lines are the means.
</figcaption></figure>{said}</div></section>"""


def temperature_section(m: Measured) -> str:
    """What the learned temperature is, and what it makes of these cosines."""
    if m.temperature is None:
        return "<section><h2>Temperature</h2><p>Measured without a model: vectors have no temperature.</p></section>"
    scale, bias, start = m.temperature["scale"], m.temperature.get("bias"), m.temperature["start"]
    rows = [["here", f"{1 / scale:.4f}", f"{scale:.2f}"], ["at its start", f"{1 / start:.4f}", f"{start:.2f}"]]
    rows += [] if bias is not None else [["highest in training", "0.0100", "100.00"]]
    likely = "counts as e (2.72) times as likely" if bias is None else "has e (2.72) times the odds"
    said = f"<p>The model multiplies cosines by {scale:.2f}: with {1 / scale:.3f} more an answer {likely}."
    if bias is None:
        p, first = float(m.alike.p_right.mean()), float(m.alike.p_first.mean())
        said += (
            f" Asked which of the {len(m.images):,} images a caption belongs to, a softmax over all of them gives the"
            f" right one a probability of <b>{percent(p)}%</b> on average (chance {percent(1 / len(m.images), 2)}%)."
            f" The image that comes first gets {percent(first)}%, and is the right one in"
            f" {percent(m.metrics['text_to_image_R@1'])}% of cases: the nearer these two, the better the probabilities"
            " can be believed.</p>"
        )
    else:  # SigLIP: each pair is a question of its own
        border = -bias / scale
        middles = (np.arange(BINS) + 0.5) * 2 / BINS - 1
        yes = 1 / (1 + np.exp(-(scale * m.alike.right.astype(float) + bias)))
        no = (m.alike.others / (1 + np.exp(-(scale * middles + bias)))).sum() / max(1, m.alike.others.sum())
        rows.append(["bias", "", f"{bias:.2f}"])
        said += (
            f" Its bias of {bias:.2f} makes each pair a question of its own (SigLIP): yes above a cosine of"
            f" {border:.3f}. Matching pairs get a probability of <b>{percent(float(yes.mean()))}%</b> on average,"
            f" others {percent(float(no), 3)}%; {percent(float((yes > 0.5).mean()))}% of the matching are above it.</p>"
        )
    shown = table(["", "temperature", "logit scale"], rows, "The temperature is 1 / logit scale")
    return f'<section><h2>Temperature</h2><div class="pair">{shown}{said}</div></section>'


def training_section(log_history: list[dict]) -> str:
    """Loss and recall over training, where the model's folder says."""
    loss = curve(log_history, "loss")
    recalls = {
        series: curve(log_history, f"eval_{way}_R@1")
        for series, way in (("a", "text_to_image"), ("b", "image_to_text"))
    }
    figures = []
    for title, curves, names in (
        ("Training loss", {"a": loss}, {"a": "loss"}),
        ("Recall@1 over training", recalls, {"a": "text to image", "b": "image to text"}),
    ):
        curves = {series: points for series, points in curves.items() if len(points) > 1}
        if not curves:
            continue
        top, last = (max(point[i] for points in curves.values() for point in points) for i in (1, 0))
        share, y_ticks = title != "Training loss", ticks(max(top, 1e-6))
        ends = ", ".join(f"{names[series]} {points[-1][1]:.3g} at the end" for series, points in curves.items())
        across, up = partial(portion, last), partial(portion, y_ticks[-1])
        chart = Chart(title, f"Up to step {last:,}: {ends}.", across, up)
        x_ticks = {step: f"{step:,.0f}" for step in ticks(last) if step <= last and step == int(step)}
        y_ticks = {value: f"{100 * value:.3g}%" if share else f"{value:.3g}" for value in y_ticks}
        chart.axes(x_ticks, y_ticks, "training step")
        for series, points in curves.items():
            chart.line(series, points, points if len(points) <= 40 else ())
        figures.append(
            f"<figure><h3>{title}</h3>{chart}{legend({series: names[series] for series in curves})}</figure>"
        )
    if not figures:
        return ""
    note = '<p class="note">Recall here is of the pairs that the run itself was evaluated on.</p>' if recalls else ""
    return f'<section><h2>Training</h2><div class="pair">{"".join(figures)}</div>{note}</section>'


def portion(whole: float, part: float) -> float:
    return max(0.0, part) / whole


def record_section(record: dict) -> str:
    """All that was written down, folded: it is in the JSON file too, and is not printed."""

    def lines(value, name: str = ""):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from lines(inner, f"{name} {key}".strip())
        elif value is not None and value is not False and value not in ([], ""):
            yield f'<tr><th scope="row">{safe(name)}</th><td>{safe(value)}</td></tr>'

    shown = f'<table class="record"><tbody>{"".join(lines(record))}</tbody></table>'
    return f"<details><summary>What it was measured with</summary>{shown}</details>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
{style}</style></head><body><main>
"""
