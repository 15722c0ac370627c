"""The figures of the geometry report (geometry.json), which has every figure of geometry.html.

In: the scores of the layer search, names of encoders and targets, and for a nested search the results of mlp_probes.py.
Out: JSON values. Fits nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from prefill_router.layers.encoder_target import (
    encoder_target_table,
    fold_interval,
    of_encoder,
    over_targets,
    own_against_foreign,
    own_encoders,
    trusting_fisher,
)
from prefill_router.layers.mlp_probes import BEST, MLP, Concatenation, PeakProbes
from prefill_router.layers.peaks import layer_rows, peaks, rank_agreement
from prefill_router.layers.table import agreement
from prefill_router.pool import Pool
from prefill_router.prefill.bundled import bundled_by_digest
from prefill_router.prefill.encoder import EncoderInfo
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.search import LayerScores

Json = dict[str, Any]
Found = Mapping[LayerKey, LayerScores]


def geometry_report(
    found: Found,
    k: int,
    pool: Pool,
    encoders: Mapping[str, EncoderInfo],
    n_queries: int,
    probes: Mapping[str, PeakProbes] | None = None,
) -> Json:
    """The geometry report. All figures are of training queries.

    `found` are scores by layer key, with geometry; `probes` are results by encoder for a nested `found`. `deep` is None
    without `probes`. Figures with an interval are {estimate, lower, upper}; None is undefined.
    """
    rows = layer_rows(found, k)
    groups = {encoder: of_encoder(found, encoder) for encoder in encoders}
    groups = groups if len(groups) == 1 else {**groups, "all": dict(found)}
    report: Json = {
        "components": k,
        "n_queries": n_queries,
        "n_folds": next(iter(found.values())).auc_on_fold.shape[1],
        "targets": list(pool.names),
        "encoders": describe(encoders),
        "layers": rows,
        "peaks": peaks(rows, pool.names),
        "agreement": {name: _agreement(own, k, pool, nested=probes is not None) for name, own in groups.items()},
        "deep": None,
    }
    if probes is not None:
        own = own_encoders({fingerprint: info.model for fingerprint, info in encoders.items()}, pool)
        report["deep"] = {
            "encoder_target": encoder_target_table(found, k, pool.names),
            "own_against_foreign": own_against_foreign(found, k, pool.names, own),
            "mlp": {
                "widths": list(MLP.widths),
                "members": MLP.members,
                "best_layers_read": BEST,
                "encoders": {encoder: _mlp(result, pool.names) for encoder, result in probes.items()},
            },
            "concatenation": {
                encoder: [_concatenation(one, pool.names) for one in result.concatenations]
                for encoder, result in probes.items()
            },
        }
    return report


def describe(encoders: Mapping[str, EncoderInfo]) -> dict[str, Json]:
    """For each fingerprint: a unique name, the kind of model, and its shape."""
    names = {fingerprint: _name(info) for fingerprint, info in encoders.items()}
    taken = list(names.values())
    return {
        fingerprint: {
            "name": names[fingerprint]
            if taken.count(names[fingerprint]) == 1
            else f"{names[fingerprint]} ({fingerprint[:8]})",
            "kind": _kind(info),
            "architecture": info.architecture,
            "n_layers": info.n_layers,
            "hidden_size": info.hidden_size,
            "last_token": info.last_token,
        }
        for fingerprint, info in encoders.items()
    }


def _kind(info: EncoderInfo) -> str:
    if bundled := bundled_by_digest(info.weights_digest):
        return bundled.kind
    return "causal language model" if info.attention == "causal" else "bidirectional encoder"


def _name(info: EncoderInfo) -> str:
    """The name of a bundled model, the last part of a local folder, or the full hub id."""
    if bundled := bundled_by_digest(info.weights_digest):
        return bundled.model_name
    path = PurePath(info.model)
    return path.name if path.is_absolute() or len(path.parts) > 2 else info.model


def _agreement(found: Found, k: int, pool: Pool, nested: bool) -> Json:
    scores = {key: searched.at(k) for key, searched in found.items()}
    plain = agreement(scores)
    return {
        **rank_agreement(layer_rows(found, k)),
        "fisher_j_per_target": plain["rank_correlation_per_target"],
        "auc_lost": plain["auc_lost"],
        "trusting_j": trusting_fisher(found, k, pool.names) if nested else None,
    }


def _mlp(probes: PeakProbes, models: Sequence[str]) -> Json:
    """AUC of both probes at every layer key that was read, and the best layer of each probe."""
    rows = [
        {
            "pooling": key.pooling,
            "layer": key.layer,
            "column": key.column,
            **_both(probes.logistic[key], probes.mlp[key], ("logistic", "mlp"), models),
        }
        for key in sorted(probes.mlp)
    ]
    best = {probe: max(rows, key=lambda row: row[probe]["estimate"] or 0.0)["column"] for probe in ("logistic", "mlp")}
    return {"blocks": rows, "best": best}


def _concatenation(one: Concatenation, models: Sequence[str]) -> Json:
    return {
        "pooling": one.pooling,
        "single": one.single.column,
        "columns": [key.column for key in one.layer_keys],
        "n_features": dict(zip(("single", "together"), one.n_features, strict=True)),
        **_both(one.auc_single, one.auc, ("auc_single", "auc"), models),
    }


def _both(reference: np.ndarray, other: np.ndarray, names: tuple[str, str], models: Sequence[str]) -> Json:
    """AUC of both (means over targets), and the second minus the first, also by target."""
    return {
        names[0]: fold_interval(over_targets(reference)).to_json(),
        names[1]: fold_interval(over_targets(other)).to_json(),
        "difference": fold_interval(over_targets(other - reference)).to_json(),
        "difference_by_target": {
            model: fold_interval(other[:, index] - reference[:, index]).to_json() for index, model in enumerate(models)
        },
    }
