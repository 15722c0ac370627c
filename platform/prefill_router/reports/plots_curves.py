"""Plots of accuracy against cost, of the normalised plane, and of reliability.

In: parts of metrics.json, and arrays. Out: SVG (`svg.to_svg`). Single models carry their rank by mean cost, 1 for the
cheapest (`models_by_cost`); the legend in the page gives their names, and the routers' names by colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from prefill_router.reports.format import Json, usd
from prefill_router.reports.svg import (
    GRID,
    INK,
    MUTED,
    N_SERIES,
    SURFACE,
    draw_markers,
    draw_proportion,
    new_axes,
    placeholder,
    series,
    styled,
    to_svg,
)

THIN = 0.004  # of the normalised plane: 2 pixels
DASHED = (0, (4, 3))
THOUSAND = 1000.0


class ExactPath(NamedTuple):
    """A router's path in the normalised plane in the order of lambda. `chosen` is the point of its chosen lambda."""

    x: Float[np.ndarray, " points"]
    y: Float[np.ndarray, " points"]
    chosen: int


def models_by_cost(pool: Json) -> list[int]:
    """Positions of the pool's models from the cheapest to the most expensive by mean cost; an undefined cost is 0."""
    costs = [model["cost"]["estimate"] or 0.0 for model in pool["models"]]
    return [int(index) for index in np.argsort(costs, kind="stable")]


@styled
def cost_curve(metrics: Json, size: tuple[int, int]) -> str:
    """Accuracy against cost on a logarithmic axis: routers, single models, mixtures of two models, oracle."""
    pool = metrics["pool"]
    costs = [point for router in metrics["routers"].values() for point in router["curve"]["cost"]]
    if None in costs or min(costs) <= 0:
        return placeholder(size, "No curve: it needs queries with complete labels and costs above 0.")
    fig, ax = new_axes(size)
    for index, router in _drawing_order(metrics):
        ax.plot(np.array(router["curve"]["cost"]) * THOUSAND, router["curve"]["accuracy"], **_line(index))
    hull = pool["mixture_hull"]["curve"]
    ax.plot(np.array(hull["cost"]) * THOUSAND, hull["accuracy"], color=MUTED, linewidth=1, linestyle=DASHED, zorder=2)
    points = {}
    for place in models_by_cost(pool):
        model = pool["models"][place]
        x, y = model["cost"]["estimate"] * THOUSAND, model["accuracy"]["estimate"]
        points[place] = (x, y, f"{model['name']}: {y:.1%} correct, {usd(x)} per 1,000 queries")
    tips = _draw_models(ax, points)
    x, y = pool["oracle_cost"]["estimate"] * THOUSAND, pool["oracle_accuracy"]["estimate"]
    said = f"oracle: {y:.1%} correct, {usd(x)} per 1,000 queries"
    tips |= draw_markers(ax, [(x, y, said)], "oracle", marker="*", s=110, color=INK, zorder=4)
    x, y = (pool["random_choice"][figure]["estimate"] for figure in ("cost", "accuracy"))
    said = f"random choice: {y:.1%} correct, {usd(x * THOUSAND)} per 1,000 queries"
    tips |= draw_markers(ax, [(x * THOUSAND, y, said)], "random", marker="x", s=28, color=INK, zorder=4)
    tips |= _draw_chosen(
        ax,
        metrics,
        {
            name: (
                router["cost_at_chosen_lambda"]["estimate"] * THOUSAND,
                router["accuracy_at_chosen_lambda"]["estimate"],
            )
            for name, router in metrics["routers"].items()
        },
    )
    ax.set_xscale("log")
    ax.margins(x=0.09)
    ax.set_ylim(top=min(1.02, ax.get_ylim()[1] + 0.02))
    ax.xaxis.set_major_locator(_cost_ticks(*ax.get_xlim()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: usd(value, 1)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlabel("mean estimated cost per 1,000 queries, USD")
    ax.set_ylabel("accuracy")
    return to_svg(fig, f"cost-{size[0]}", tips, "Accuracy against mean cost of every router and single model")


@styled
def plane(metrics: Json, paths: Mapping[str, ExactPath], size: tuple[int, int]) -> str:
    """The normalised plane: inverse cost (x) and accuracy (y), with the routers' exact paths."""
    pool = metrics["pool"]
    if any(router["p_auccc_exact"]["estimate"] is None for router in metrics["routers"].values()):
        reason = next(iter(metrics["routers"].values()))["p_auccc_exact"].get("reason", "")
        return placeholder(size, f"No plane: {reason}.")
    fig, ax = new_axes(size)
    for index, (x, y, _) in list(enumerate(paths[name] for name in metrics["routers"]))[::-1]:
        shown = thinned(x, y)
        ax.plot(x[shown], y[shown], **_line(index))
        ax.plot([0, x[0]], [y[0]] * 2, color=series(index), linewidth=1, linestyle=(0, (1, 2)), zorder=3)
    hull = pool["mixture_hull"]["curve"]
    ax.plot(hull["X"], hull["Y"], color=MUTED, linewidth=1, linestyle=DASHED, zorder=2)
    optimal = sorted((model["X"], model["Y"]) for model in pool["models"] if model["pareto"])
    ax.plot(*zip(*optimal, strict=True), color=MUTED, linewidth=0.8, zorder=2)
    points = {}
    for place in models_by_cost(pool):
        model = pool["models"][place]
        points[place] = (model["X"], model["Y"], f"{model['name']}: X {model['X']:.3f}, Y {model['Y']:.3f}")
    tips = _draw_models(ax, points)
    tips |= _draw_chosen(
        ax, metrics, {name: (path.x[path.chosen], path.y[path.chosen]) for name, path in paths.items()}
    )
    tips |= draw_markers(ax, [(1.0, 1.0, "oracle")], "oracle", marker="*", s=110, color=INK, zorder=4, clip_on=False)
    ax.set_xlim(-0.035, 1.035)
    ax.set_ylim(top=max(1.04, ax.get_ylim()[1]))
    ax.set_xlabel("X: inverse cost (0 most expensive, 1 cheapest)")
    ax.set_ylabel("Y: accuracy (0 cheapest model, 1 oracle)")
    return to_svg(fig, f"plane-{size[0]}", tips, "The normalised plane of accuracy and inverse cost")


@styled
def reliability(
    p: Float[np.ndarray, " queries"], correct: Float[np.ndarray, " queries"], name: str, n_bins: int = 10
) -> str:
    """Share correct against confidence in bins of equal size with 95 % intervals, and a histogram of the confidences.

    Queries without a label are left out.
    """
    fig, ax = new_axes((180, 170))
    known = ~np.isnan(correct)
    p, correct = p[known], correct[known]
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=DASHED, zorder=2)
    counts, edges = np.histogram(p, bins=20, range=(0, 1))
    ax.bar(edges[:-1], 0.22 * counts / max(counts.max(), 1), width=0.05, align="edge", color=GRID, zorder=1)
    for part in np.array_split(np.argsort(p, kind="stable"), n_bins):
        if len(part):
            draw_proportion(ax, float(p[part].mean()), float(correct[part].sum()), len(part), size=14, linewidth=1.2)
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
    return to_svg(fig, f"reliability-{name}", {}, f"Reliability of {name}")


def thinned(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], reach: float = THIN) -> list[int]:
    """Positions of the points to draw: those at least `reach` from the previous one in x or y, and the last."""
    kept = [0]
    for index in range(1, len(x)):
        if abs(x[index] - x[kept[-1]]) >= reach or abs(y[index] - y[kept[-1]]) >= reach:
            kept.append(index)
    return kept if kept[-1] == len(x) - 1 else [*kept, len(x) - 1]


def _cost_ticks(low: float, high: float) -> LogLocator:
    """Ticks of a logarithmic axis: powers of ten, with steps in between if the axis spans few of them."""
    decades = float(np.log10(high / low))
    return LogLocator(subs=(1,) if decades > 1.5 else (1, 2, 5) if decades > 0.7 else tuple(range(1, 10)))


def _drawing_order(metrics: Json) -> list[tuple[int, Json]]:
    """(index, router), the first router last so that it is drawn on top."""
    return list(enumerate(metrics["routers"].values()))[::-1]


def _line(index: int) -> dict[str, Any]:
    """The style of a router's line. Routers beyond N_SERIES share colours and are dashed."""
    dashes = "solid" if index < N_SERIES else (0, (5, 1 + index // N_SERIES))
    return {
        "color": series(index),
        "linewidth": 2.4 if index == 0 else 1.5,
        "linestyle": dashes,
        "zorder": 3.5 if index == 0 else 3,
    }


def _draw_models(ax: Axes, points: Mapping[int, tuple[float, float, str]]) -> dict[str, str]:
    """Draws each model as a circle with its number, in the given order. Returns the tooltips."""
    tips: dict[str, str] = {}
    for number, point in enumerate(points.values(), start=1):
        style: Any = {"s": 150, "facecolor": SURFACE, "edgecolor": MUTED, "linewidth": 1.1, "zorder": 4}
        tips |= draw_markers(ax, [point], f"model-{number}", clip_on=False, **style)
        ax.text(*point[:2], str(number), fontsize=9, color=INK, ha="center", va="center_baseline", zorder=4)
    return tips


def _draw_chosen(ax: Axes, metrics: Json, at: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """Draws a dot at every router's chosen lambda. Returns the tooltips."""
    tips: dict[str, str] = {}
    for index, (name, router) in enumerate(metrics["routers"].items()):
        tips |= draw_markers(
            ax,
            [(*at[name], f"{name} at its chosen λ = {router['chosen_lambda']:g}")],
            f"chosen-{index}",
            s=60 if index == 0 else 42,
            color=series(index),
            edgecolor=SURFACE,
            linewidth=1.4,
            zorder=5,
        )
    return tips
