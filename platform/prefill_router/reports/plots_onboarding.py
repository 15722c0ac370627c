"""Plot of the page on an onboarded model: the held-out Brier score over the number of labels.

In: `experiments.onboarding.Curve`. Out: SVG (`svg.to_svg`).
"""

from __future__ import annotations

import numpy as np

from prefill_router.experiments.onboarding import Curve
from prefill_router.reports.svg import INK, LABEL, MUTED, draw_markers, new_axes, series, styled, to_svg

FURTHER = 10  # the fitted form is drawn up to this many times the largest subsample


@styled
def brier_curve(curve: Curve, labels: int, size: tuple[int, int]) -> str:
    """The Brier score of the head and of the constant rate on queries they did not see: mean and range of draws.

    The dashed line is the fitted form; beyond the vertical line at `labels` it is an extrapolation.
    """
    fig, ax = new_axes(size)
    tips: dict[str, str] = {}
    x = np.array([point.labels for point in curve.points], dtype=np.float64)
    for index, (name, values) in enumerate(
        (
            ("head", [point.brier for point in curve.points]),
            ("constant rate", [point.brier_constant for point in curve.points]),
        )
    ):
        mean = np.array([one.mean() for one in values])
        ax.fill_between(
            x,
            [one.min() for one in values],
            [one.max() for one in values],
            color=series(index),
            alpha=0.14,
            linewidth=0,
        )
        ax.plot(x, mean, color=series(index), linewidth=1.8)
        points = [
            (float(at), float(value), f"{name}, {at:.0f} labels: {value:.4f}")
            for at, value in zip(x, mean, strict=True)
        ]
        tips |= draw_markers(ax, points, name.split()[0], s=26, color=series(index), linewidth=0, zorder=4)
    far = np.geomspace(x[0], FURTHER * x[-1], 60)
    ax.plot(far, curve.brier(far), color=series(0), linewidth=1.2, linestyle=(0, (4, 3)))
    ax.axvline(labels, color=MUTED, linewidth=1)
    ax.annotate(
        f"{labels:,} labels",
        (labels, 1),
        xytext=(4, -10),
        textcoords="offset points",
        xycoords=("data", "axes fraction"),
        color=INK,
        fontsize=LABEL,
    )
    ax.set_xscale("log")
    ticks = [float(f"{tick:.1g}") for tick in np.geomspace(x[0], FURTHER * x[-1], 6 if size[0] > 400 else 4)]
    ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("labelled queries (log scale)")
    ax.set_ylabel("Brier score")
    return to_svg(fig, f"labels-{size[0]}", tips, "Brier score of the head over the number of labels")
