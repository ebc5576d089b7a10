"""The one style of all charts, charts.mplstyle: figures that need no display, byte-identical PNG and SVG.

Matplotlib takes half a second to import, so it is imported here, when a chart is drawn, and nowhere else."""

import io
import re
import textwrap
import warnings
from contextlib import contextmanager
from pathlib import Path

from miniclip.reports.contact_sheet import fill, safe
from miniclip.utils.files import replacing

INK, GREY, GRID, PAPER, CELL = "#1f2328", "#5b6470", "#e3e6ea", "#ffffff", "#f4f5f7"
GREEN, RED, BLUE, ORANGE = "#15803d", "#c0392b", "#1d4ed8", "#b45309"
CSS_VARIABLES = {INK: "ink", GREY: "grey", GRID: "grid", PAPER: "paper", BLUE: "a", ORANGE: "b"}
WIDTH = 11.8  # inches, of a PNG; 200 pixels each
SVG_SIZE = 440 / 72, 270 / 72


@contextmanager
def styled():
    """A decorator: the function draws in this style, whatever matplotlib's settings are."""
    from matplotlib import font_manager, rcParams, style

    with style.context(Path(__file__).with_name("charts.mplstyle"), True), warnings.catch_warnings():
        installed = font_manager.get_font_names()
        rcParams["font.family"] = [name for name in rcParams["font.family"] if name in installed]
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
        yield


def new_figure(width: float, height: float, **kwargs):
    """A matplotlib Figure, in inches, that pyplot does not know of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), **{"layout": "constrained", **kwargs})
    FigureCanvasAgg(figure)
    return figure


def save_png(path: str | Path, figure):
    """Writes a PNG atomically and returns the figure."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", metadata={"Software": None})
    return figure


def to_svg(figure, title: str, description: str) -> str:
    """The figure as SVG for an HTML page, whose style sheet sets font and colours. Screen readers read the texts."""
    from matplotlib import rcParams

    file = io.StringIO()
    rcParams["svg.hashsalt"] = title  # ids that differ between the charts of a page; `styled` resets it
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = file.getvalue().partition("</style>\n </defs>")[2].replace("xlink:href", "href")
    body = re.sub(r' id="[\w.]*[a-z]_\d+"| transform="rotate\(-0 [^"]*"|font-family: [^;"]*;? ?', "", body)
    for colour, name in CSS_VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    width, height = 72 * figure.get_size_inches()
    return fill("chart", width=width, height=height, title=safe(title), description=safe(description), body=body)


def fit(label, text: str, inches: float, lines: int = 1):
    """Sets the text of a label, wrapped to a width; "..." marks where it is cut."""
    text, columns = " ".join(text.split()), int(14 * inches)
    while True:
        label.set_text("\n".join(textwrap.wrap(text, columns, max_lines=lines, placeholder="...")))
        if columns <= 4 or label.get_window_extent().width <= inches * label.figure.dpi:
            return
        columns -= max(1, columns // 12)
