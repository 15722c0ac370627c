"""The layer table and its plot: where a target's correctness shows, and whether Fisher's J finds the place.

In: what the layer search found per block. Out: an Arrow table (one row per block x target x k), a figure, and the
paper's claim in two numbers (section 7): the rank correlation of J with AUC, and the AUC lost by choosing layers by J.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.stats import spearmanr

from prefill_router.signals.geometry import Geometry
from prefill_router.signals.probe import Block, ProbeScores
from prefill_router.signals.search import FISHER_COMPONENTS, LayerScores

UNKNOWN = Geometry(*(float("nan"),) * 4)
COLOURS = {"mean": "#0072b2", "last": "#d55e00"}  # Okabe and Ito's palette, safe for colour-blind readers


def layer_table(found: Mapping[Block, LayerScores], models: Sequence[str]) -> pa.Table:
    """One row per (block, target, number of components); the geometry, which knows neither, is repeated.

    `fisher_j` is J at FISHER_COMPONENTS, at which layers are compared, `fisher_j_at_components` at the row's own k.
    """
    return pa.Table.from_pylist([
        {"encoder": block.encoder, "pooling": block.pooling, "layer": block.layer, "target": model, "components": k,
         "auc": _number(scores.auc[at, index]), "fisher_j": _number(scores.fisher_at(FISHER_COMPONENTS)[index]),
         "fisher_j_at_components": _number(scores.fisher_at(k)[index]),
         **{name: _number(value) for name, value in asdict(scores.geometry or UNKNOWN).items()}}
        for block, scores in found.items() for index, model in enumerate(models) for at, k in enumerate(scores.ks)])


def agreement(scores: Mapping[Block, ProbeScores]) -> dict[str, float | None]:
    """The two numbers, and how many blocks they are over; null where all blocks score alike.

    `rank_correlation` of J with AUC is that of their means over targets, `rank_correlation_per_target` the mean of the
    targets' own; `auc_lost` is the AUC of the best block less that of J's choice, mean over targets.
    """
    auc = np.stack([score.auc for score in scores.values()])
    fisher = np.stack([score.fisher for score in scores.values()])
    own = [_rank_correlation(fisher[:, model], auc[:, model]) for model in range(auc.shape[1])]
    defined = [value for value in own if value is not None]
    chosen = fisher.argmax(axis=0)
    return {"rank_correlation": _rank_correlation(fisher.mean(axis=1), auc.mean(axis=1)),
            "rank_correlation_per_target": float(np.mean(defined)) if defined else None,
            "auc_lost": float((auc.max(axis=0) - auc[chosen, np.arange(auc.shape[1])]).mean()),
            "blocks": len(scores)}


def plot_layers(found: Mapping[Block, LayerScores], k: int, path: Path) -> None:
    """Four panels by layer, a line per pooling, as SVG: AUC on k components (targets thin), J, d_eff, anisotropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scores = {block: searched.at(k) for block, searched in found.items()}
    geometry = {block: searched.geometry or UNKNOWN for block, searched in found.items()}
    panels = {f"probe AUC, {k} components": lambda b: scores[b].auc, "Fisher J": lambda b: scores[b].fisher,
              "effective dimension (standardised)": lambda b: [geometry[b].d_eff],
              "anisotropy (raw states)": lambda b: [geometry[b].anisotropy_raw]}
    lines = sorted({(block.encoder, block.pooling) for block in scores})
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
        for index, (encoder, pooling) in enumerate(lines):
            blocks = sorted(block for block in scores if (block.encoder, block.pooling) == (encoder, pooling))
            x, y = [block.layer for block in blocks], np.array([values(block) for block in blocks], dtype=float)
            style = ("-", "--", ":", "-.")[(index // 2) % 4]
            if y.shape[1] > 1:
                axis.plot(x, y, style, color=COLOURS[pooling], alpha=0.25, linewidth=0.8)
            axis.plot(x, y.mean(axis=1), style, color=COLOURS[pooling], linewidth=2, marker="o", markersize=4,
                      label=f"{pooling} pooling" if len(lines) <= 2 else f"{pooling}, {encoder[:8]}")
        axis.set_title(title, loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[1]:
        axis.set_xlabel("hidden-state index (0 is the embedding output)")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, format="svg")
    plt.close(figure)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; null where one side does not vary."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
