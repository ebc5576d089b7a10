"""The one style of all charts: colours, fonts, figures that need no display, byte-identical PNG and SVG.

Matplotlib takes half a second to import, so it is imported here, when a chart is drawn, and nowhere else.
"""

import io
import re
import textwrap
import warnings
from functools import wraps
from html import escape
from pathlib import Path

from miniclip.utils.files import replacing

INK, GREY, GRID, PAPER, CELL = "#1f2328", "#5b6470", "#e3e6ea", "#ffffff", "#f4f5f7"
GREEN, RED = "#15803d", "#c0392b"
SERIES = ["#1d4ed8", "#b45309", "#8b3fc7", "#0f9f9a"]  # they differ in dashes and markers too, for print in grey
WIDTH = 11.8  # inches, of a PNG; 200 pixels each
SVG_SIZE = 440 / 72, 270 / 72
# Fonts with Chinese glyphs; those that are installed are used where DejaVu Sans lacks a glyph.
CHINESE = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei",
    "PingFang SC", "Hiragino Sans GB", "Heiti TC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "Arial Unicode MS",
)  # fmt: skip
STYLE = {
    "savefig.dpi": 200, "figure.facecolor": PAPER, "font.size": 10, "text.color": INK, "text.parse_math": False,
    "figure.titlesize": 15, "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.labelcolor": GREY, "axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.xmargin": 0.02,
    "grid.color": GRID, "xtick.color": GREY, "ytick.color": GREY, "ytick.major.size": 0, "lines.linewidth": 1.8,
    "lines.markersize": 4.5, "legend.frameon": False, "legend.borderaxespad": 0.3, "legend.handlelength": 2.4,
    "legend.columnspacing": 2.8, "hatch.linewidth": 0.9, "svg.fonttype": "none",
    "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.1,
    "axes.prop_cycle": f"cycler(color={SERIES}, linestyle=['-', '--', '-.', ':'], marker=['o', 's', '^', 'D'])",
}  # fmt: skip
CSS_VARIABLES = {INK: "ink", GREY: "grey", GRID: "grid", PAPER: "paper", SERIES[0]: "a", SERIES[1]: "b"}


def styled(draw):
    """A decorator: the function draws in this style, whatever matplotlib's settings are."""

    @wraps(draw)
    def wrapper(*args, **kwargs):
        from matplotlib import style
        from matplotlib.font_manager import get_font_names

        installed = get_font_names()
        fonts = {"font.family": ["DejaVu Sans", *(name for name in CHINESE if name in installed)]}
        with style.context(STYLE | fonts, after_reset=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
            return draw(*args, **kwargs)

    return wrapper


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
    """The figure as an SVG element for an HTML page, whose style sheet sets its font and colours (`CSS_VARIABLES`).
    `title` and `description` are what a screen reader reads."""
    import matplotlib

    file = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = title  # ids that differ between the charts of a page; `styled` resets it
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = file.getvalue().partition("</style>\n </defs>")[2]
    body = re.sub(r' id="[\w.]*[a-z]_\d+"| transform="rotate\(-0 [^"]*"|font-family: [^;"]*;? ?', "", body)
    body = body.replace("xlink:href", "href")
    for colour, name in CSS_VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    width, height = (f"{72 * inches:g}" for inches in figure.get_size_inches())
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{body}"
    )


def fit(label, text: str, inches: float, lines: int = 1):
    """Sets the text of a label, wrapped to a width; "..." marks where it is cut."""
    text, columns = " ".join(text.split()), int(14 * inches)
    while True:
        label.set_text("\n".join(textwrap.wrap(text, columns, max_lines=lines, placeholder="...")))
        if columns <= 4 or label.get_window_extent().width <= inches * label.figure.dpi:
            return
        columns -= max(1, columns // 12)
