"""How is a curve drawn so that it is sharp on any screen and on paper? As SVG, which stands in a page as text.

Colours come from the page's style sheet, by class: `a`, `b` and `c` are series, which differ by their dashes, markers
and hatching too, for those who print in grey or do not tell colours apart.
"""

from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 440, 280  # in the chart's own units; the page draws it as wide as there is room
LEFT, RIGHT, TOP, BOTTOM = 46, 424, 12, 234  # the plot within it
Points = Sequence[tuple[float, float]]
# The hatching of filled areas: one pattern for the whole page, in a drawing without size.
HATCHING = (
    '<svg width="0" height="0" aria-hidden="true" class="defs"><defs><pattern id="hatch" width="5" height="5"'
    ' patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="5" class="hatch"/>'
    "</pattern></defs></svg>"
)


class Chart:
    """A chart whose `title` and `description` stand for it where it cannot be seen. `across` and `up` place a value
    within the plot, from 0 (left, below) to 1."""

    def __init__(self, title: str, description: str, across: Callable, up: Callable):
        self.title, self.description = title, description
        self.across, self.up = across, up
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        return LEFT + (RIGHT - LEFT) * self.across(value)

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * self.up(value)

    def axes(self, x_ticks: dict[float, str], y_ticks: dict[float, str], x_label: str):
        """Lines and numbers: {value: what is written there}."""
        for value, text in y_ticks.items():
            level = self.y(value)
            self.parts.append(f'<line class="grid" x1="{LEFT}" y1="{level:.1f}" x2="{RIGHT}" y2="{level:.1f}"/>')
            self.parts.append(f'<text x="{LEFT - 6}" y="{level + 4:.1f}" class="end">{escape(text)}</text>')
        for value, text in x_ticks.items():
            place = self.x(value)
            self.parts.append(f'<line class="tick" x1="{place:.1f}" y1="{BOTTOM}" x2="{place:.1f}" y2="{BOTTOM + 5}"/>')
            self.parts.append(f'<text x="{place:.1f}" y="{BOTTOM + 20}" class="mid">{escape(text)}</text>')
        self.parts.append(f'<line class="tick" x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{BOTTOM}"/>')
        self.parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}" class="mid">{escape(x_label)}</text>')

    def line(self, series: str, points: Points, markers: Points = ()):
        """A line through points; markers are discs, those of series b squares."""
        self.parts.append(f'<polyline class="line {series}" points="{self._path(points)}"/>')
        for x, y in ((self.x(x), self.y(y)) for x, y in markers):
            shape = f'rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"' if series == "b" else (
                f'circle cx="{x:.1f}" cy="{y:.1f}" r="4"'
            )  # fmt: skip
            self.parts.append(f'<{shape} class="mark {series}"/>')

    def area(self, series: str, edges: Sequence[float], heights: Sequence[float]):
        """A histogram: a filled outline of steps, `heights[i]` from `edges[i]` to `edges[i + 1]`."""
        bars = [i for i, height in enumerate(heights) if height > 0]
        bars = range(bars[0], bars[-1] + 1)  # no line where there is nothing
        steps = [(edge, heights[i]) for i in bars for edge in (edges[i], edges[i + 1])]
        path = self._path([(steps[0][0], 0), *steps, (steps[-1][0], 0)])
        self.parts.append(f'<polygon class="area {series}" points="{path}"/>')
        self.parts.append(f'<polyline class="line {series}" points="{path}"/>')

    def upright(self, series: str, value: float):
        """A line from below to the top, at a value across."""
        place = self.x(value)
        self.parts.append(
            f'<line class="line thin {series}" x1="{place:.1f}" y1="{TOP}" x2="{place:.1f}" y2="{BOTTOM}"/>'
        )

    def _path(self, points: Points) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def __str__(self) -> str:
        about = f"<title>{escape(self.title)}</title><desc>{escape(self.description)}</desc>"
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">{about}\n'
            + "\n".join(self.parts) + "\n</svg>"
        )  # fmt: skip


def legend(names: dict[str, str], area: bool = False) -> str:
    """What each series is: {series: name}."""
    sample = '<rect class="area {0}" x="1" y="2" width="26" height="10"/><rect class="line {0}" x="1" y="2" width="26"'
    sample = sample + ' height="10"/>' if area else '<line class="line {0}" x1="0" y1="7" x2="28" y2="7"/>'
    marks = {} if area else {"a": '<circle class="mark a" cx="14" cy="7" r="4"/>',
                             "b": '<rect class="mark b" x="10" y="3" width="8" height="8"/>'}  # fmt: skip
    lines = (
        f'<li><svg class="sample" viewBox="0 0 28 14" aria-hidden="true">{sample.format(series)}'
        f"{marks.get(series, '')}</svg> {escape(name)}</li>"
        for series, name in names.items()
    )
    return f'<ul class="legend">{"".join(lines)}</ul>'
