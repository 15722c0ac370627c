"""Encoder against target: each target's AUC by each encoder's best layer, its own states, and J as the chooser.

In: what a nested layer search found per block. Out: JSON values, AUC with intervals (paper tables 2, A.1, A.2).

The best of many layers flatters itself. So every AUC here is nested: for each fold the layer is the one that the
other folds favour, its probe is fitted on them, and it is judged on the fold. Folds share most of their training
queries, so intervals are those of the corrected resampled t-test (Nadeau and Bengio, 2003): Student's t over the
folds, the variance of the mean taken as (1 / folds + held out / training) times that over folds. Differences are
paired by fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy.stats import t

from prefill_router.metrics.bootstrap import LEVEL, Interval
from prefill_router.pool import Pool
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.search import LayerScores
from prefill_router.signals.selection import select

Json = dict[str, Any]
Found = Mapping[LayerKey, LayerScores]


def fold_interval(values: Float[np.ndarray, " folds"]) -> Interval:
    """Mean over the folds in which the figure is defined, and its interval; without one where fewer than two are."""
    defined = values[~np.isnan(values)]
    n = len(defined)
    if not n:
        return Interval(None, None, None, "no fold has both right and wrong answers")
    mean = float(defined.mean())
    if n < 2:
        return Interval(mean, None, None, "only one fold has both right and wrong answers")
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * float(defined.std(ddof=1)) * (1 / n + 1 / (len(values) - 1)) ** 0.5
    return Interval(mean, mean - half, mean + half)


def over_targets(values: Float[np.ndarray, "folds models"]) -> Float[np.ndarray, " folds"]:
    """Each fold's mean over the targets that are defined in it."""
    n = (~np.isnan(values)).sum(axis=1)
    return np.where(n > 0, np.nansum(values, axis=1) / np.maximum(n, 1), np.nan)


def nested_auc(
    found: Found, k: int, models: Sequence[str], strategy: Literal["cv", "fisher"] = "cv"
) -> tuple[Float[np.ndarray, "folds models"], tuple[LayerKey, ...], list[tuple[LayerKey, ...]]]:
    """AUC on each fold by the block that the other folds choose; the blocks that all folds choose; and those by fold.

    `found` is of a nested search. Raises InputError for a target of one class.
    """
    selection = select({key: scores.at(k) for key, scores in found.items()}, strategy, models)
    by_fold = [tuple(own[0] for own in layer_keys) for layer_keys in selection.layer_keys_without]
    auc = np.array(
        [
            [_on_fold(found[key], k)[fold, model] for model, key in enumerate(layer_keys)]
            for fold, layer_keys in enumerate(by_fold)
        ]
    )
    return auc, tuple(own[0] for own in selection.layer_keys), by_fold


def encoder_target_table(found: Found, k: int, models: Sequence[str]) -> Json:
    """AUC per encoder and target, the best encoder of each target, and the same with the encoder chosen too (`any`).

    Beside each nested AUC `column`, the layer that all folds choose, and `auc_of_the_best`, its plain cross-validated
    AUC: the maximum over layers, which flatters. `lead` is that of a target's best encoder over its next best.
    """
    encoders = list(dict.fromkeys(key.encoder for key in sorted(found)))
    nested, table = {}, {}
    for encoder in encoders:
        own = of_encoder(found, encoder)
        auc, chosen, by_fold = nested[encoder] = nested_auc(own, k, models)
        table[encoder] = _row(own, k, models, auc, chosen, by_fold)
    of_target: Json = {}
    for index, model in enumerate(models):
        estimates = {encoder: table[encoder]["by_target"][model]["auc"]["estimate"] for encoder in encoders}
        ranked = sorted((name for name in encoders if estimates[name] is not None), key=lambda name: -estimates[name])
        lead = (
            fold_interval(nested[ranked[0]][0][:, index] - nested[ranked[1]][0][:, index]).to_json()
            if len(ranked) > 1
            else None
        )
        of_target[model] = {"encoder": ranked[0] if ranked else None, "lead": lead}
    any_encoder = _row(found, k, models, *nested_auc(found, k, models)) if len(encoders) > 1 else None
    return {"encoders": table, "best": of_target, "any": any_encoder}


def trusting_fisher(found: Found, k: int, models: Sequence[str]) -> Json:
    """Nested AUC, mean over targets, of layers chosen by J less that of layers chosen by AUC: by how much J loses."""
    fisher, cv = (nested_auc(found, k, models, strategy)[0] for strategy in ("fisher", "cv"))
    return fold_interval(over_targets(fisher - cv)).to_json()


def own_encoders(encoders: Mapping[str, str], pool: Pool) -> dict[str, list[str]]:
    """Targets that are encoders too, with the fingerprints. `encoders` is the model of each fingerprint.

    A model is known by its name in the pool or at its endpoint, whole or after the last slash, in any case.
    """
    found: dict[str, list[str]] = {}
    for target in pool.models:
        names = {target.name, target.endpoint.model if target.endpoint and target.endpoint.model else target.name}
        wanted = {form for name in names for form in _forms(name)}
        own = [fingerprint for fingerprint, model in encoders.items() if wanted & _forms(model)]
        if own:
            found[target.name] = own
    return found


def own_against_foreign(found: Found, k: int, models: Sequence[str], own: Mapping[str, Sequence[str]]) -> list[Json]:
    """Of each target that is an encoder too: nested AUC by its own states, by the best of all others, the difference.

    The foreign encoder is chosen with the layer, without the fold; null where there is no other.
    """
    rows = []
    for target, mine in own.items():
        index = models.index(target)
        parts = (
            {key: scores for key, scores in found.items() if (key.encoder in mine) is whose} for whose in (True, False)
        )
        sides = [nested_auc(part, k, models) if part else None for part in parts]
        row: Json = {"target": target}
        for name, side in zip(("own", "foreign"), sides, strict=True):
            row[name] = (
                None
                if side is None
                else {
                    "auc": fold_interval(side[0][:, index]).to_json(),
                    "encoder": side[1][index].encoder,
                    "column": side[1][index].column,
                }
            )
        row["difference"] = (
            None
            if sides[0] is None or sides[1] is None
            else fold_interval(sides[0][0][:, index] - sides[1][0][:, index]).to_json()
        )
        rows.append(row)
    return rows


def of_encoder(found: Found, encoder: str) -> dict[LayerKey, LayerScores]:
    """The blocks of one encoder."""
    return {key: scores for key, scores in found.items() if key.encoder == encoder}


def _on_fold(scores: LayerScores, k: int) -> Float[np.ndarray, "folds models"]:
    return scores.auc_on_fold[scores.ks.index(k)]


def _row(
    found: Found,
    k: int,
    models: Sequence[str],
    auc: np.ndarray,
    chosen: Sequence[LayerKey],
    by_fold: Sequence[Sequence[LayerKey]],
) -> Json:
    best = [float(found[key].at(k).auc[index]) for index, key in enumerate(chosen)]
    return {
        "mean": fold_interval(over_targets(auc)).to_json(),
        "mean_of_the_best": float(np.mean(best)),
        "by_target": {
            model: {
                "auc": fold_interval(auc[:, index]).to_json(),
                "auc_of_the_best": best[index],
                "encoder": chosen[index].encoder,
                "column": chosen[index].column,
                "columns_by_fold": [layer_keys[index].column for layer_keys in by_fold],
            }
            for index, model in enumerate(models)
        },
    }


def _forms(name: str) -> set[str]:
    return {name.casefold(), PurePath(name).name.casefold()}
