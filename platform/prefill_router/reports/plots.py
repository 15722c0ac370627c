"""The report's figures as inline SVG: text stays text, colours are CSS variables, so light, dark and print just work.

In: metrics.json's parts and arrays. Out: SVG markup whose width follows its container. Colours are drawn as sentinels
and replaced: `--ink`, `--muted`, `--grid`, `--surface`, `--s0`, `--s1`, ... for the routers in their order, `--h0` to
`--h8` for a scale. Drawn by matplotlib without pyplot: no global state. Here are the curves and what every figure
needs; `plots_choices` and `plots_layers` draw the others.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox, BboxBase

N_SERIES, N_LEVELS = 8, 9
LABEL = 11.5  # points, which are pixels at the figure's own width
THIN = 0.004  # of the plane: 2 pixels
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
Json = Mapping[str, Any]
Arguments = ParamSpec("Arguments")
Label = tuple[float, float, str, str, str]


class ExactPath(NamedTuple):
    """A router's path in the normalised plane, in the order of lambda, and where on it its chosen lambda is."""

    x: Float[np.ndarray, " points"]
    y: Float[np.ndarray, " points"]
    chosen: int


def _styled(draw: Callable[Arguments, str]) -> Callable[Arguments, str]:
    @wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def series(index: int) -> str:
    """The sentinel colour of the router at `index`; after N_SERIES they come round again, told apart by dashes."""
    return f"#0a0b{index % N_SERIES:02x}"


def level(index: int) -> str:
    """The sentinel colour of a step of the scale: 0 is next to the page, N_LEVELS - 1 farthest from it."""
    return f"#0a0c{index:02x}"


@_styled
def cost_curve(metrics: Json, size: tuple[int, int]) -> str:
    """Accuracy against cost (log) of routers, single models, mixtures and the oracle."""
    fig, ax = _axes(size)
    pool = metrics["pool"]
    thousand = 1000.0
    costs = [point for router in metrics["routers"].values() for point in router["curve"]["cost"]]
    if None in costs or min(costs) <= 0:
        return _nothing(size, "No curve: it needs queries with complete labels and costs above 0.")
    obstacles = []
    for index, router in _drawn(metrics):
        cost = np.array(router["curve"]["cost"]) * thousand
        accuracy = np.array(router["curve"]["accuracy"])
        ax.plot(cost, accuracy, **_line(index))
        obstacles += list(zip(cost, accuracy, strict=True))
    hull = pool["mixture_hull"]["curve"]
    ax.plot(
        np.array(hull["cost"]) * thousand, hull["accuracy"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=2
    )
    points = [
        (model["cost"]["estimate"] * thousand, model["accuracy"]["estimate"], model["name"]) for model in pool["models"]
    ]
    tips = _tips(
        ax,
        [(x, y, f"{name}: {y:.1%} correct, {usd(x)} per 1,000 queries") for x, y, name in points],
        "model",
        marker="o",
        s=30,
        facecolor=SURFACE,
        edgecolor=INK,
        linewidth=1.2,
        zorder=4,
    )
    oracle = (pool["oracle_cost"]["estimate"] * thousand, pool["oracle_accuracy"]["estimate"], "oracle")
    tips |= _tips(
        ax,
        [(*oracle[:2], f"oracle: {oracle[1]:.1%} correct, {usd(oracle[0])} per 1,000 queries")],
        "oracle",
        marker="*",
        s=110,
        color=INK,
        zorder=4,
    )
    random = pool["random_choice"]
    points.append((random["cost"]["estimate"] * thousand, random["accuracy"]["estimate"], "random choice"))
    tips |= _tips(
        ax, [(*points[-1][:2], "a model chosen at random")], "random", marker="x", s=28, color=MUTED, zorder=4
    )
    tips |= _chosen_points(
        ax,
        metrics,
        {
            name: (
                router["cost_at_chosen_lambda"]["estimate"] * thousand,
                router["accuracy_at_chosen_lambda"]["estimate"],
            )
            for name, router in metrics["routers"].items()
        },
    )
    ax.set_xscale("log")
    ax.margins(x=0.09)
    ax.set_ylim(top=min(1.02, ax.get_ylim()[1] + 0.02))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: usd(value, 1)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlabel("mean estimated cost per 1,000 queries, USD")
    ax.set_ylabel("accuracy")
    ends = {
        name: (router["curve"]["cost"][0] * thousand, router["curve"]["accuracy"][0])
        for name, router in metrics["routers"].items()
    }
    best, *others = sorted(points, key=lambda point: -point[1])
    labels = [(*ends[name], name, series(i), "bold" if i == 0 else "normal") for i, name in enumerate(ends)]
    labels += [(*oracle, INK, "normal"), (*best, MUTED, "normal")]
    _label(fig, ax, labels, [(x, y, name, MUTED, "normal") for x, y, name in others], obstacles)
    return _svg(fig, f"cost-{size[0]}", tips, "Accuracy against mean cost of every router and single model")


@_styled
def plane(metrics: Json, paths: Mapping[str, ExactPath], size: tuple[int, int]) -> str:
    """The normalised plane: X towards cheap, Y towards the oracle. Routers' exact paths, their areas in the legend."""
    fig, ax = _axes(size)
    pool = metrics["pool"]
    if any(router["p_auccc_exact"]["estimate"] is None for router in metrics["routers"].values()):
        reason = next(iter(metrics["routers"].values()))["p_auccc_exact"].get("reason", "")
        return _nothing(size, f"No plane: {reason}.")
    for index, (x, y, _) in list(enumerate(paths[name] for name in metrics["routers"]))[::-1]:
        shown = _thinned(x, y)
        ax.plot(x[shown], y[shown], **_line(index))
        ax.plot([0, x[0]], [y[0]] * 2, color=series(index), linewidth=1, linestyle=(0, (1, 2)), zorder=3)
    hull = pool["mixture_hull"]["curve"]
    ax.plot(hull["X"], hull["Y"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    optimal = sorted((model["X"], model["Y"]) for model in pool["models"] if model["pareto"])
    ax.plot(*zip(*optimal, strict=True), color=MUTED, linewidth=0.8, zorder=2)
    tips = _tips(
        ax,
        [
            (model["X"], model["Y"], f"{model['name']}: X {model['X']:.3f}, Y {model['Y']:.3f}")
            for model in pool["models"]
        ],
        "model",
        marker="o",
        s=26,
        facecolor=SURFACE,
        edgecolor=INK,
        linewidth=1.2,
        zorder=4,
    )
    tips |= _chosen_points(
        ax, metrics, {name: (path.x[path.chosen], path.y[path.chosen]) for name, path in paths.items()}
    )
    tips |= _tips(
        ax, [(1.0, 1.0, "the oracle corner")], "oracle", marker="*", s=110, color=INK, zorder=4, clip_on=False
    )
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(top=max(1.04, ax.get_ylim()[1]))
    ax.set_xlabel("X: inverse cost, 0 dearest model, 1 cheapest")
    ax.set_ylabel("Y: accuracy, 0 cheapest model, 1 oracle")
    rows = [
        (name, router["p_auccc_exact"]["estimate"], series(i), "bold" if i == 0 else "normal")
        for i, (name, router) in enumerate(metrics["routers"].items())
    ]
    rows += [
        ("mixtures of models (dashed)", pool["mixture_hull"]["p_auccc"]["estimate"], MUTED, "normal"),
        ("single models (thin)", pool["model_only"]["p_auccc"]["estimate"], MUTED, "normal"),
    ]
    rows.sort(key=lambda row: -row[1])
    _areas(fig, ax, rows, np.concatenate([np.column_stack([path.x, path.y]) for path in paths.values()]))
    return _svg(fig, f"plane-{size[0]}", tips, "The normalised accuracy and inverse-cost plane")


@_styled
def reliability(
    p: Float[np.ndarray, " queries"], correct: Float[np.ndarray, " queries"], name: str, n_bins: int = 10
) -> str:
    """Share correct against confidence in bins of equal size, with 95 % Wilson intervals; bars show where p lies."""
    fig, ax = _axes((180, 170))
    known = ~np.isnan(correct)
    p, correct = p[known], correct[known]
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
    counts, edges = np.histogram(p, bins=20, range=(0, 1))
    ax.bar(edges[:-1], 0.22 * counts / max(counts.max(), 1), width=0.05, align="edge", color=GRID, zorder=1)
    for part in np.array_split(np.argsort(p, kind="stable"), n_bins):
        if len(part):
            low, high = _wilson(correct[part].sum(), len(part))
            ax.plot([p[part].mean()] * 2, [low, high], color=series(0), linewidth=1.2, alpha=0.55, zorder=3)
            ax.scatter(p[part].mean(), correct[part].mean(), s=14, color=series(0), zorder=4, linewidth=0)
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
    return _svg(fig, f"reliability-{name}", {}, f"Reliability of {name}")


def usd(value: float, significant: int = 3) -> str:
    """Dollars to three significant digits: $0.00412, $0.250, $12.3, $1,230."""
    digits = significant - 1 - int(np.floor(np.log10(abs(value)))) if value else 0
    return f"${value:,.{max(0, digits)}f}"


def _axes(size: tuple[int, int]) -> tuple[Figure, Axes]:
    matplotlib_figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
    return matplotlib_figure, matplotlib_figure.add_subplot()


def _drawn(metrics: Json) -> list[tuple[int, Json]]:
    """(index, router), the first last: it lies on top."""
    return list(enumerate(metrics["routers"].values()))[::-1]


def _line(index: int) -> dict[str, Any]:
    dashes = "solid" if index < N_SERIES else (0, (5, 1 + index // N_SERIES))
    return {
        "color": series(index),
        "linewidth": 2.4 if index == 0 else 1.5,
        "linestyle": dashes,
        "zorder": 3.5 if index == 0 else 3,
    }


def _tips(ax: Axes, points: Sequence[tuple[float, float, str]], name: str, **style: Any) -> dict[str, str]:
    """Draws one marker per point and returns {element id: what it says when pointed at}."""
    tips = {}
    for index, (x, y, text) in enumerate(points):
        ax.scatter([x], [y], gid=f"tip-{name}-{index}", **style)
        tips[f"tip-{name}-{index}"] = text
    return tips


def _chosen_points(ax: Axes, metrics: Json, at: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    tips: dict[str, str] = {}
    for index, (name, router) in enumerate(metrics["routers"].items()):
        tips |= _tips(
            ax,
            [(*at[name], f"{name} at its chosen λ = {router['chosen_lambda']:g}")],
            f"chosen-{index}",
            s=44 if index == 0 else 30,
            color=series(index),
            edgecolor=SURFACE,
            linewidth=1.2,
            zorder=5,
        )
    return tips


def _thinned(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], reach: float = THIN) -> list[int]:
    """Which points to draw: those `reach` from the last one drawn, and the last."""
    kept = [0]
    for index in range(1, len(x)):
        if abs(x[index] - x[kept[-1]]) >= reach or abs(y[index] - y[kept[-1]]) >= reach:
            kept.append(index)
    return kept if kept[-1] == len(x) - 1 else [*kept, len(x) - 1]


def _areas(
    fig: Figure, ax: Axes, rows: Sequence[tuple[str, float, str, str]], obstacles: Float[np.ndarray, "points 2"]
) -> None:
    """Lists (name, area, colour, weight) at the top right, or at the bottom left where fewer points are in the way."""
    FigureCanvasAgg(fig).draw()
    unit = fig.dpi / 72
    wide, high, frame = 230 * unit, (17 * len(rows) + 40) * unit, ax.get_window_extent()
    x, y = ax.transData.transform(obstacles).T
    fig.set_layout_engine("none")  # what was measured stays where it is
    above, below = (
        int((inside_x & inside_y).sum())
        for inside_x, inside_y in (
            (x > frame.x1 - wide, y > frame.y1 - high),
            (x < frame.x0 + wide, y < frame.y0 + high),
        )
    )
    for place, (name, value, colour, weight) in enumerate([("area under the path", None, MUTED, "normal"), *rows]):
        at: Any = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "color": colour,
            "fontsize": LABEL,
            "fontweight": weight,
            "va": "top",
            "ha": "right",
            "zorder": 6,
        }
        corner, right, down = (
            ((1, 1), 0, -22 - 17 * place) if above <= below else ((0, 0), 225, 24 + 17 * (len(rows) - place))
        )
        ax.annotate(
            _short(name), corner, xytext=(right - (50 if value is not None else 0), down), gid=f"halo-{place}", **at
        )
        if value is not None:
            ax.annotate(
                f"{value:.3f}".replace("-", "\N{MINUS SIGN}"),
                corner,
                xytext=(right, down),
                gid=f"halo-area-{place}",
                **at,
            )


def _label(
    fig: Figure, ax: Axes, needed: Sequence[Label], wanted: Sequence[Label], obstacles: Sequence[tuple[float, float]]
) -> None:
    """Writes each label (x, y, text, colour, weight) beside its point where it meets no label, marker or curve.

    Where there is no such place, one that is needed moves off on a line or else crosses curves, and one that is only
    wanted is left out.
    """
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    renderer = canvas.get_renderer()
    fig.set_layout_engine("none")  # what was measured stays where it is
    unit = fig.dpi / 72
    frame = ax.get_window_extent(renderer)
    labels = [*needed, *wanted]
    marks = ax.transData.transform([label[:2] for label in labels])
    written = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in marks]
    lines = [Bbox.from_bounds(x - 1.5, y - 1.5, 3, 3) for x, y in ax.transData.transform(list(obstacles))]
    for number, ((at_x, at_y, text, colour, weight), (x, y)) in enumerate(zip(labels, marks, strict=True)):
        probe = ax.text(0, 0, _short(text), fontsize=LABEL, fontweight=weight)
        size = probe.get_window_extent(renderer)
        probe.remove()
        near, far = [[gap * unit for gap in gaps] for gaps in ((6, 12), (20, 30, 45, 60, 80))]
        spot, leader = _free_spot(x, y, size, frame, written + lines, near), None
        if spot is None and number < len(needed):
            spot = _free_spot(x, y, size, frame, written + lines, far)
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
        if spot is None and number < len(needed):
            spot, leader = _free_spot(x, y, size, frame, written, near + far), None
        if spot is None:
            continue
        written.append(spot)
        ax.annotate(
            _short(text),
            (at_x, at_y),
            color=colour,
            fontsize=LABEL,
            fontweight=weight,
            ha="left",
            xytext=((spot.x0 - x) / unit, (spot.y0 - y) / unit + 2.5),
            textcoords="offset points",
            va="baseline",
            zorder=6,
            gid=f"halo-{number}",
            arrowprops=leader,
        )


def _free_spot(
    x: float, y: float, size: BboxBase, frame: BboxBase, taken: Sequence[Bbox], gaps: Sequence[float]
) -> Bbox | None:
    width, height = size.width, size.height
    for gap in gaps:
        right, left, above, below = x + gap * 0.7, x - gap * 0.7 - width, y + gap * 0.5, y - gap * 0.5 - height
        for corner in (
            (x + gap, y - height / 2),
            (x - gap - width, y - height / 2),
            (x - width / 2, y + gap),
            (x - width / 2, y - gap - height),
            (right, above),
            (right, below),
            (left, above),
            (left, below),
        ):
            spot = Bbox.from_bounds(*corner, width, height)
            inside = frame.x0 <= spot.x0 and spot.x1 <= frame.x1 + 2 and frame.y0 <= spot.y0 and spot.y1 <= frame.y1
            if inside and not any(spot.overlaps(box) for box in taken):
                return spot
    return None


def _short(name: str, longest: int = 30) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _wilson(k: float, n: int, z: float = 1.96) -> tuple[float, float]:
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    return centre - half, centre + half


def _nothing(size: tuple[int, int], text: str) -> str:
    return (
        f'<svg viewBox="0 0 {size[0]} 60" role="img"><text x="{size[0] / 2}" y="34" text-anchor="middle" '
        f'style="fill: var(--muted); font-size: 12px">{escape(text)}</text></svg>'
    )


def _svg(fig: Figure, name: str, tips: Mapping[str, str], label: str) -> str:
    """The figure as markup fit to stand in HTML: own ids, CSS colours, no namespaces, tooltips."""
    name = re.sub(r"\W+", "-", name)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
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
    for sentinel, variable in VARIABLES.items():
        svg = svg.replace(sentinel, f"var(--{variable})")
    for element, text in tips.items():
        svg = svg.replace(f'<g id="{name}-{element}">', f'<g id="{name}-{element}"><title>{escape(text)}</title>')
    return re.sub(r"\s*\n\s*", "\n", svg)


def _rounded(text: str) -> str:
    """Coordinates to a hundredth of a pixel, which halves the file."""
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text)
