"""Plots of the chosen models: along lambda, and by confidence.

In: shares as `metrics.choices` gives them, models ordered from the cheapest to the most expensive. Out: SVG
(`svg.to_svg`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import PercentFormatter

from prefill_router.metrics.choices import ByConfidence
from prefill_router.reports.svg import (
    INK,
    LABEL,
    MUTED,
    SURFACE,
    draw_proportion,
    new_axes,
    new_figure,
    styled,
    to_svg,
)


def model_colours(n: int) -> list[str]:
    """Colours from the cheapest to the most expensive model: ordered by lightness, safe for colour-blind readers."""
    return [to_hex(colormaps["viridis"](value)) for value in np.linspace(0.96, 0.14, n)]


@styled
def choice_shares(
    shares: Float[np.ndarray, "points models"],
    lambdas: Float[np.ndarray, " points"],
    colours: Sequence[str],
    chosen_lambda: float,
    size: tuple[int, int],
) -> str:
    """Share of queries per model along lambda; models from the cheapest (bottom) to the most expensive (top)."""
    fig, ax = new_axes(size)
    ax.stackplot(lambdas, shares.T, colors=colours, linewidth=0.4, edgecolor=SURFACE)
    ax.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    ticks = [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1][:: 1 if size[0] > 500 else 2]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.axvline(chosen_lambda, color=INK, linewidth=1.4, zorder=5)
    ax.annotate(
        f"chosen λ = {chosen_lambda:g}",
        (chosen_lambda, 1),
        xytext=(0, 4),
        textcoords="offset points",
        ha="left" if chosen_lambda < 0.25 else "right",
        color=INK,
        fontsize=LABEL,
        xycoords=("data", "axes fraction"),
    )
    ax.set_xlabel("λ (square-root scale): 0 confidence only, 1 cost only")
    ax.set_ylabel("share of queries")
    ax.grid(False)
    return to_svg(fig, f"shares-{size[0]}", {}, "Share of queries per model along lambda")


@styled
def choice_by_confidence(
    found: ByConfidence, order: Sequence[int], colours: Sequence[str], size: tuple[int, int]
) -> str:
    """By tenth of confidence. Above, the share of each model; below, the chosen models' accuracy and mean confidence.

    `order` lists the models from the cheapest to the most expensive.
    """
    fig = new_figure(size)
    above, below = fig.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
    n = len(found.highest)
    edges, middles = np.repeat(np.arange(n + 1), 2)[1:-1], np.arange(n) + 0.5
    above.stackplot(edges, np.repeat(found.share[:, order], 2, axis=0).T, colors=colours, linewidth=0)
    above.vlines(np.arange(1, n), 0, 1, color=SURFACE, linewidth=2)
    above.set(ylim=(0, 1), ylabel="share of queries")
    above.grid(False)
    for x, right, known in zip(middles, found.n_right, found.n_labelled, strict=True):
        if known:
            draw_proportion(below, float(x), float(right), int(known), size=26, linewidth=1.4)
    below.plot(middles, found.confidence, color=MUTED, linewidth=1.4, zorder=2, marker="_", markersize=9)
    below.set(xlim=(0, n), ylabel="accuracy")
    below.set_xticks(middles, [f"{value:.2f}".removeprefix("0") for value in found.highest])
    below.tick_params(axis="x", length=0)
    below.set_xlabel("highest confidence, mean of each tenth")
    below.grid(False, axis="x")
    for ax in (above, below):
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    fig.align_ylabels()
    return to_svg(fig, f"confident-{size[0]}", {}, "Share of each model, and accuracy, by the router's confidence")
