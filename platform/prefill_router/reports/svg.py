"""Drawing primitives of the plots: style, colours, markers with tooltips, and SVG for embedding in HTML.

A plot function is decorated with `styled`, draws on matplotlib axes and returns `to_svg(...)`. Text remains text.
Colours are placeholders while drawing and CSS variables in the SVG, so that one plot fits light, dark and print:
`--ink`, `--muted`, `--grid`, `--surface`, `--s0` to `--s7` for series, `--h0` to `--h8` for a colour scale. Figures are
made without pyplot, so there is no global state. Sizes are (width, height) in pixels at full width.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

N_SERIES, N_LEVELS = 8, 9
LABEL = 11.5  # font size in points; 1 point is 1 pixel at full width
INK, MUTED, GRID, SURFACE = "#010203", "#020304", "#030405", "#040506"
VARIABLES = (
    {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"}
    | {f"#0a0b{index:02x}": f"s{index}" for index in range(N_SERIES)}
    | {f"#0a0c{index:02x}": f"h{index}" for index in range(N_LEVELS)}
)
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 12,
    "axes.labelpad": 6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "xtick.minor.size": 0,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
Arguments = ParamSpec("Arguments")
Size = tuple[int | float, int | float]


def styled(draw: Callable[Arguments, str]) -> Callable[Arguments, str]:
    """Decorator: calls the plot function with STYLE in force."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def series(index: int) -> str:
    """The placeholder colour of series `index`; colours repeat after N_SERIES."""
    return f"#0a0b{index % N_SERIES:02x}"


def level(index: int) -> str:
    """The placeholder colour of a step of the colour scale, from 0 (nearest to the background) to N_LEVELS - 1."""
    return f"#0a0c{index:02x}"


def new_figure(size: Size) -> Figure:
    """An empty figure of `size` pixels."""
    return Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")


def new_axes(size: Size) -> tuple[Figure, Axes]:
    """A figure of `size` pixels with one pair of axes."""
    figure = new_figure(size)
    return figure, figure.add_subplot()


def draw_markers(ax: Axes, points: Sequence[tuple[float, float, str]], name: str, **style: Any) -> dict[str, str]:
    """Draws one marker per (x, y, tooltip). Returns the tooltips by element id, for `to_svg`.

    `name` must be unique within the figure.
    """
    tips = {}
    for index, (x, y, tip) in enumerate(points):
        ax.scatter([x], [y], gid=f"tip-{name}-{index}", **style)
        tips[f"tip-{name}-{index}"] = tip
    return tips


def draw_proportion(ax: Axes, x: float, n_right: float, n: int, size: int, linewidth: float) -> None:
    """Draws the proportion `n_right / n` at `x` as a marker of area `size`, with its 95 % Wilson interval as a line."""
    z = 1.96
    centre = (n_right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(n_right * (n - n_right) / n + z * z / 4)
    ax.plot([x, x], [centre - half, centre + half], color=series(0), linewidth=linewidth, alpha=0.55, zorder=3)
    ax.scatter(x, n_right / n, s=size, color=series(0), linewidth=0, zorder=4)


def shortened(name: str, longest: int = 30) -> str:
    """The name, cut to `longest` characters with an ellipsis."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def placeholder(size: Size, text: str) -> str:
    """An SVG with a line of text, for a plot without data."""
    return (
        f'<svg viewBox="0 0 {size[0]} 60" role="img"><text x="{size[0] / 2}" y="34" text-anchor="middle" '
        f'style="fill: var(--muted); font-size: 12px">{escape(text)}</text></svg>'
    )


def to_svg(figure: Figure, name: str, tips: Mapping[str, str], label: str) -> str:
    """The figure as an SVG element whose width follows its container.

    `name` is unique on the page and prefixes all ids; `label` is the accessible name; `tips` are tooltips by element
    id.
    """
    name = re.sub(r"\W+", "-", name)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<svg[^>]*?(viewBox=\"[^\"]+\")[^>]*>", rf'<svg \1 role="img" aria-label="{escape(label)}">', svg, count=1
    )
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    svg = re.sub(r'(?<= )(?:d|x|y)="[^"]*"', lambda found: _rounded(found[0]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    for element, tip in tips.items():
        svg = svg.replace(f'<g id="{name}-{element}">', f'<g id="{name}-{element}"><title>{escape(tip)}</title>')
    return re.sub(r"\s*\n\s*", "\n", svg)


def _rounded(text: str) -> str:
    """Coordinates rounded to a hundredth of a pixel, which halves the size."""
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text)
