"""Encoders against targets: AUC of each target with each encoder, with its own states, and with layers chosen by J.

In: the scores of a nested layer search. Out: JSON values, AUC with intervals (paper tables 2, A.1, A.2).

The AUC of the best of many layers is biased upwards. Therefore every AUC here is nested: the other folds choose the
layer and fit the probe, and the AUC is measured on the held-out fold. Folds share most of their training queries, so
intervals are those of the corrected resampled t-test (Nadeau and Bengio, 2003): Student's t over folds, with the
variance of the mean equal to (1 / folds + held out / training) times the variance over folds. Differences are paired by
fold.
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
from prefill_router.signals.selection import select_layers

Json = dict[str, Any]
Found = Mapping[LayerKey, LayerScores]


def fold_interval(values: Float[np.ndarray, " folds"]) -> Interval:
    """Mean over the folds with a defined figure, and its interval; no interval if fewer than two folds have one."""
    defined = values[~np.isnan(values)]
    n = len(defined)
    if not n:
        return Interval(None, None, None, "no fold has both correct and wrong answers")
    mean = float(defined.mean())
    if n < 2:
        return Interval(mean, None, None, "only one fold has both correct and wrong answers")
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * float(defined.std(ddof=1)) * (1 / n + 1 / (len(values) - 1)) ** 0.5
    return Interval(mean, mean - half, mean + half)


def over_targets(values: Float[np.ndarray, "folds models"]) -> Float[np.ndarray, " folds"]:
    """The mean of each fold over the targets with a defined figure; NaN if there are none."""
    n = (~np.isnan(values)).sum(axis=1)
    return np.where(n > 0, np.nansum(values, axis=1) / np.maximum(n, 1), np.nan)


def nested_auc(
    found: Found, k: int, models: Sequence[str], strategy: Literal["cv", "fisher"] = "cv"
) -> tuple[Float[np.ndarray, "folds models"], tuple[LayerKey, ...], list[tuple[LayerKey, ...]]]:
    """Nested AUC: (AUC on each fold, the layer keys chosen by all folds, the layer keys chosen without each fold).

    The AUC on a fold is that of the layer key chosen by the other folds. `found` comes from a nested search. Raises
    InputError for a target with labels of one class.
    """
    selection = select_layers({key: scores.at(k) for key, scores in found.items()}, strategy, models)
    by_fold = [tuple(own[0] for own in layer_keys) for layer_keys in selection.layer_keys_without]
    auc = np.array(
        [
            [_on_fold(found[key], k)[fold, model] for model, key in enumerate(layer_keys)]
            for fold, layer_keys in enumerate(by_fold)
        ]
    )
    return auc, tuple(own[0] for own in selection.layer_keys), by_fold


def encoder_target_table(found: Found, k: int, models: Sequence[str]) -> Json:
    """AUC per encoder and target, the best encoder of each target, and the AUC if the encoder is chosen too (`any`).

    Next to each nested AUC: `column`, the layer chosen by all folds, and `auc_of_the_best`, its plain cross-validated
    AUC, which is biased upwards. `lead` is the AUC of a target's best encoder minus that of the second best.
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
    """Nested AUC with layers chosen by J minus that with layers chosen by AUC, means over targets."""
    fisher, cv = (nested_auc(found, k, models, strategy)[0] for strategy in ("fisher", "cv"))
    return fold_interval(over_targets(fisher - cv)).to_json()


def own_encoders(encoders: Mapping[str, str], pool: Pool) -> dict[str, list[str]]:
    """Targets that are also encoders, with the fingerprints. `encoders` maps each fingerprint to a model name.

    Matches the name of the model in the pool or at its endpoint, in full or after the last slash, ignoring case.
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
    """For each target that is also an encoder: nested AUC with its own states, with other encoders, the difference.

    The foreign encoder and its layer are chosen without the fold; null if there is no other encoder.
    """
    rows = []
    for target, mine in own.items():
        index = models.index(target)
        groups = (
            {key: scores for key, scores in found.items() if (key.encoder in mine) is is_own}
            for is_own in (True, False)
        )
        sides = [nested_auc(group, k, models) if group else None for group in groups]
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
    """The scores of one encoder's layer keys."""
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
