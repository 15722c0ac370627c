"""Peaks of d_eff, anisotropy, J and probe AUC over the layers, and their rank agreement (paper section 7).

In: the scores of the layer search, with geometry. Out, as JSON values (None if undefined): a row per layer key, the
peak layers of every (encoder, pooling), and rank correlations with AUC. J and AUC are means over targets, and per
target.

The peak of anisotropy is its *lowest* value, because the paper prefers isotropic states. The peaks use d_eff of
standardised states and anisotropy of raw states, because standardising centres the states and removes most of their
anisotropy. The rows also have d_eff of raw and anisotropy of standardised states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr

from prefill_router.signals.geometry import Geometry
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.search import LayerScores

Json = dict[str, Any]
METRICS = ("d_eff", "anisotropy", "fisher_j", "auc")
LOWEST = {"anisotropy"}
GEOMETRY = {
    "d_eff": "d_eff",
    "d_eff_raw": "d_eff_raw",
    "anisotropy": "anisotropy_raw",
    "anisotropy_standardised": "anisotropy",
}  # name of the figure in the rows: field of Geometry
UNKNOWN = Geometry(*(float("nan"),) * 4)


def layer_rows(found: Mapping[LayerKey, LayerScores], k: int) -> list[Json]:
    """One row per layer key: geometry, and AUC on k components and J, as means over targets and by target."""
    rows = []
    for key in sorted(found):
        scores, geometry = found[key].at(k), found[key].geometry or UNKNOWN
        rows.append(
            {
                "encoder": key.encoder,
                "pooling": key.pooling,
                "layer": key.layer,
                **{name: known(getattr(geometry, field)) for name, field in GEOMETRY.items()},
                "fisher_j": mean(scores.fisher),
                "auc": mean(scores.auc),
                "fisher_j_by_target": [known(value) for value in scores.fisher],
                "auc_by_target": [known(value) for value in scores.auc],
            }
        )
    return rows


def peaks(rows: Sequence[Json], models: Sequence[str]) -> list[Json]:
    """For every (encoder, pooling) and metric: peak layer, value, mean AUC there; for J and AUC also by target."""
    found = []
    for encoder, pooling in dict.fromkeys((row["encoder"], row["pooling"]) for row in rows):
        own = [row for row in rows if (row["encoder"], row["pooling"]) == (encoder, pooling)]
        found.append(
            {
                "encoder": encoder,
                "pooling": pooling,
                **{metric: _peak(own, [row[metric] for row in own], metric) for metric in METRICS},
                "by_target": {
                    model: {
                        metric: _peak(own, [row[f"{metric}_by_target"][place] for row in own], metric)
                        for metric in ("fisher_j", "auc")
                    }
                    for place, model in enumerate(models)
                },
            }
        )
    return found


def peak_layers(found: Mapping[LayerKey, LayerScores], k: int, without: int | None = None) -> dict[str, LayerKey]:
    """The layer key of `found` at the peak of each metric; a metric that is undefined everywhere is left out.

    With `without`, J and AUC are those without this fold (of a nested search). The geometry uses no labels and is
    always that of all folds.
    """
    layer_keys = sorted(found, key=lambda key: (key.layer, key))
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for key in layer_keys:
        scores, geometry = found[key].at(k), found[key].geometry or UNKNOWN
        auc, fisher = (
            (scores.auc, scores.fisher)
            if without is None
            else (scores.auc_without[without], scores.fisher_without[without])
        )
        for metric, value in (
            ("d_eff", geometry.d_eff),
            ("anisotropy", geometry.anisotropy_raw),
            ("fisher_j", mean(fisher)),
            ("auc", mean(auc)),
        ):
            values[metric].append(np.nan if value is None else value)
    places = {metric: _best(values[metric], metric) for metric in METRICS}
    return {metric: layer_keys[place] for metric, place in places.items() if place is not None}


def rank_agreement(rows: Sequence[Json]) -> Json:
    """Spearman's rank correlation with AUC of J and of the label-free metrics; J and AUC are means over targets."""
    auc = np.array([row["auc"] for row in rows], dtype=float)
    return {
        metric: rank_correlation(np.array([row[metric] for row in rows], dtype=float), auc)
        for metric in ("fisher_j", *GEOMETRY)
    } | {"blocks": len(rows)}


def rank_correlation(a: Float[np.ndarray, " layer_keys"], b: Float[np.ndarray, " layer_keys"]) -> float | None:
    """Spearman's rank correlation over layer keys with both values defined; None if one of them is constant."""
    both = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[both], b[both]
    return float(spearmanr(a, b).statistic) if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0 else None


def known(value: float) -> float | None:
    """The value, or None for NaN."""
    return None if np.isnan(value) else float(value)


def mean(values: Float[np.ndarray, " models"]) -> float | None:
    """The mean over the targets with a defined value; None if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def _peak(rows: Sequence[Json], values: Sequence[float | None], metric: str) -> Json | None:
    place = _best([np.nan if value is None else value for value in values], metric)
    return None if place is None else {"layer": rows[place]["layer"], "value": values[place], "auc": rows[place]["auc"]}


def _best(values: Sequence[float], metric: str) -> int | None:
    """The position of the peak; ties: the first. None if all values are NaN."""
    array = np.array(values, dtype=float) * (-1 if metric in LOWEST else 1)
    return None if np.isnan(array).all() else int(np.nanargmax(array))
