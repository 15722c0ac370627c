"""Fitting a router: layers, projections, trunk and calibration, each without seeing what it is judged on.

In: outcomes, a split, states of the candidate blocks, the encoders' token counts. Out: a `FittedRouter`: the router,
and the predictions of the training (or calibration) queries that were made without them.

Nesting (EQUATIONS.md, SharedTrunkNet): one partition of the training queries into folds. For the fit without fold f
everything is chosen and fitted on the other folds: layer, scaler, PCA, ensemble, whose early stopping watches a slice
of those other folds. Platt scaling then sees only predictions made this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, model_validator

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.outcomes.splits import Scheme, Split, make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.pool import Pool
from prefill_router.prefill.config import EncoderConfig, Pooling
from prefill_router.routing import policy
from prefill_router.routing.calibration import CalibratorName, calibrated_across, fit_calibrator
from prefill_router.routing.candidates import Mode, candidate_layers, fixed_layers
from prefill_router.routing.cost import CostModel, fit_costs
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.router import Router
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.signals.geometry import labelled_both
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey, LayerStates, unique_layer_keys
from prefill_router.signals.projection import Projection, fit_projection, fold_moments
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.signals.search import search_layers
from prefill_router.signals.selection import ProbeScores, Selection, Strategy, select

LAMBDAS = np.arange(101) / 100
N_FOLDS = 5
VALIDATION_FOLDS = 10  # early stopping watches one query in ten of a fit's own training rows


class FitConfig(FrozenModel):
    """How a router is fitted."""

    seed: Annotated[int, Field(ge=0, description="of split, folds and ensemble")] = 0
    scheme: Annotated[Scheme, Field(description="85/15 calibrates out of fold, 75/10/15 on its calibration part")] = (
        "85/15"
    )
    mode: Annotated[
        Mode,
        Field(
            description="whose states a target reads: auto, of the encoder whose best probe wins; "
            "single, of one encoder for all; per_model, as `encoders` maps"
        ),
    ] = "auto"
    encoders: Annotated[
        str | dict[str, str] | None,
        Field(
            description="mode single: an encoder's fingerprint or model name; per_model: one for "
            "each target, {target: encoder}"
        ),
    ] = None
    pooling: Annotated[Pooling | None, Field(description="read states of this pooling only")] = None
    strategy: Annotated[Strategy, Field(description="how each target's layer is chosen")] = "cv"
    fixed: Annotated[
        str | tuple[str, ...] | None, Field(description="with strategy fixed: last_L4, or one such name per target")
    ] = None
    each_pooling: Annotated[
        bool, Field(description="each target gets its best layer of every pooling, not only its best block")
    ] = True
    layers_per_target: Annotated[
        int,
        Field(ge=1, description="best layers of each target that are read; with each_pooling so many of every pooling"),
    ] = 1
    components: Annotated[int, Field(ge=1, description="PCA components k of each block")] = 64
    trunk: TrunkConfig = TrunkConfig()
    calibrator: Annotated[
        CalibratorName, Field(description="map from the ensemble's probability to the confidence")
    ] = "platt"

    @model_validator(mode="after")
    def _encoders_fit_the_mode(self) -> FitConfig:
        if self.mode == "auto" and self.encoders is not None:
            raise ValueError(
                f"encoders: got {self.encoders!r} in mode auto, which takes any; set mode to single or "
                "per_model, or leave encoders out"
            )
        if self.mode == "single" and isinstance(self.encoders, dict):
            raise ValueError("encoders: got a mapping in mode single; name one encoder, or set mode to per_model")
        if self.mode == "per_model" and not isinstance(self.encoders, dict):
            raise ValueError(
                f"encoders: got {self.encoders!r} in mode per_model; give a mapping from each target to its encoder"
            )
        return self


@dataclass(frozen=True)
class FittedRouter:
    """Predictions made without the query, NaN on other queries: `held_out_p` calibrated as the router is,
    `held_out_figures` of confidences whose calibrator has not seen the query either."""

    router: Router
    selection: Selection
    scores: Mapping[LayerKey, ProbeScores]
    held_out_p: Float[np.ndarray, "queries models"]
    held_out_figures: Mapping[str, float]


def check_two_classes(outcomes: Outcomes, train: Int[np.ndarray, " train"]) -> None:
    """Raises InputError naming a model whose training labels are all equal."""
    both = labelled_both(outcomes.correct[train])
    for name, fine, labels in zip(outcomes.models, both, outcomes.correct[train].T, strict=True):
        if not fine:
            values = sorted({int(value) for value in labels[~np.isnan(labels)]})
            raise InputError(
                f"outcomes: the training labels of {name} are {values or 'all missing'}; both 0 and 1 are "
                "needed to learn from: leave the model out of the pool or add outcomes"
            )


def fit_router(
    signals: Signals,
    pool: Pool,
    split: Split,
    config: FitConfig,
    lineage: Mapping[str, Any],
    progress: bool = False,
) -> FittedRouter:
    """Fits a router on `split.train`. No state or label of a test query is read.

    `lineage` goes into the checkpoint's manifest. Raises InputError for a target whose training labels are of one
    class, a fixed layer that the activations do not hold, or an unknown encoder or target.
    """
    outcomes, states, train = signals.outcomes, signals.states, split.train
    candidates = candidate_layers(
        signals.layer_keys, signals.encoders, outcomes.models, config.mode, config.encoders, config.pooling
    )
    check_two_classes(outcomes, train)
    folds = make_folds(outcomes, train, config.seed, N_FOLDS)
    scores, selection = choose_layers(outcomes, train, folds, candidates, states, config, progress)
    held_out_by_fold = config.scheme == "85/15"
    wanted = [selection.layer_keys, *(selection.layer_keys_without if held_out_by_fold else ())]
    fits, maps = _project(wanted, outcomes, train, folds, states, config)
    ensembles = train_ensembles(
        fits, outcomes.correct, config.trunk, config.seed, progress="training" if progress else None
    )
    rows, parts = held_out_rows(outcomes, split, folds, config.seed)
    raw = held_out_probabilities(ensembles, fits, rows, parts)
    calibrator = fit_calibrator(config.calibrator, raw, outcomes.correct[rows])
    held_out = np.full(outcomes.correct.shape, np.nan)
    held_out[rows] = calibrator(raw)
    chosen = unique_layer_keys(selection.layer_keys)
    counts = signals.n_tokens[chosen[0].encoder]
    costs = fit_costs(pool, outcomes, train, counts)
    router = Router(
        pool=pool,
        encoders=_encoders_read(signals.encoders, chosen),
        layer_keys=chosen,
        projections=maps,
        ensemble=ensembles[0],
        calibrator=calibrator,
        costs=costs,
        chosen_lambda=best_lambda(held_out, outcomes, rows, costs, counts),
        manifest={
            **lineage,
            "fit": config.model_dump(mode="json"),
            "target_layers": {
                name: [[key.encoder, key.column] for key in own]
                for name, own in zip(pool.names, selection.layer_keys, strict=True)
            },
            "layer_scores": [
                {
                    "encoder": key.encoder,
                    "pooling": key.pooling,
                    "layer": key.layer,
                    "auc": _numbers(score.auc),
                    "fisher_j": _numbers(score.fisher),
                }
                for key, score in scores.items()
            ],
        },
    )
    across = calibrated_across(partial(fit_calibrator, config.calibrator), raw, outcomes.correct[rows], parts)
    return FittedRouter(router, selection, scores, held_out, held_out_figures(across, outcomes.correct[rows]))


def held_out_figures(
    p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]
) -> dict[str, float]:
    """`held_out_auc` and `held_out_brier` of predictions made without the query, means over models."""
    return {
        "held_out_auc": float(np.nanmean(auc_per_model(correct, p))),
        "held_out_brier": float(np.nanmean(np.nanmean(np.square(p - correct), axis=0))),
    }


def choose_layers(
    outcomes: Outcomes,
    train: np.ndarray,
    folds: np.ndarray,
    candidates: Sequence[Sequence[LayerKey]],
    states: LayerStates,
    config: FitConfig,
    progress: bool,
) -> tuple[dict[LayerKey, ProbeScores], Selection]:
    """Probes every candidate on the training queries (none under `fixed`) and chooses for each target among its own."""
    if config.strategy == "fixed":
        return {}, select_configured({}, config, candidates, outcomes.models)
    scores = score_layers(
        outcomes,
        train,
        folds,
        unique_layer_keys(candidates),
        states,
        config.components,
        config.strategy == "cv",
        config.scheme == "85/15",
        progress,
    )
    return scores, select_configured(scores, config, candidates, outcomes.models)


def score_layers(
    outcomes: Outcomes,
    train: np.ndarray,
    folds: np.ndarray,
    layer_keys: Sequence[LayerKey],
    states: LayerStates,
    k: int,
    with_auc: bool,
    nested: bool,
    progress: bool,
) -> dict[LayerKey, ProbeScores]:
    """The scores of every block on the training queries; each block is read once."""
    found = search_layers(
        layer_keys,
        lambda key: states(key)[train],
        outcomes.correct[train],
        folds,
        [k],
        with_auc=with_auc,
        nested=nested,
        progress="layer search" if progress else None,
    )
    return {key: searched.at(k) for key, searched in found.items()}


def select_configured(
    scores: Mapping[LayerKey, ProbeScores],
    config: FitConfig,
    candidates: Sequence[Sequence[LayerKey]],
    models: Sequence[str],
) -> Selection:
    """What `config` chooses from the scores at its k; `fixed` needs none."""
    if config.strategy == "fixed":
        chosen = fixed_layers(config.fixed, candidates, models)
        return Selection(chosen, (chosen,) * N_FOLDS)
    own = {key: scores[key] for key in unique_layer_keys(candidates)}
    return select(own, config.strategy, models, config.each_pooling, config.layers_per_target, candidates)


def best_lambda(
    p: Float[np.ndarray, "queries models"],
    outcomes: Outcomes,
    rows: Int[np.ndarray, " part"],
    costs: CostModel,
    n_tokens: Int[np.ndarray, " queries"],
) -> float:
    """The lambda of the 101-point sweep that is most accurate on held-out predictions; of equals the cheapest.

    0 where no query has all its labels.
    """
    rows = rows[outcomes.complete[rows]]
    if not len(rows):
        return 0.0
    cost = costs.estimate(n_tokens[rows], outcomes.input_tokens[rows])
    cost_norm, correct, at = costs.normalise(cost), outcomes.correct[rows], np.arange(len(rows))
    points = []
    for lam in LAMBDAS:
        chosen = policy.choose(p[rows], cost, cost_norm, lam)
        points.append((-correct[at, chosen].mean(), cost[at, chosen].mean(), lam))
    return float(min(points)[2])


def _project(
    wanted: Sequence[Sequence[Sequence[LayerKey]]],
    outcomes: Outcomes,
    train: np.ndarray,
    folds: np.ndarray,
    states: LayerStates,
    config: FitConfig,
) -> tuple[list[Fit], tuple[Projection, ...]]:
    """Each fit's features, by projections fitted on its own training rows; and the first fit's projections.

    `wanted[0]` are the whole training split's blocks, `wanted[1 + f]` those chosen without fold f. Every block is
    read once.
    """
    chosen = [unique_layer_keys(layer_keys) for layer_keys in wanted]
    projected: list[dict[LayerKey, np.ndarray]] = [{} for _ in chosen]
    projections: dict[LayerKey, Projection] = {}
    for key in unique_layer_keys(chosen):
        wanted_here = [(index, config.components) for index, layer_keys in enumerate(chosen) if key in layer_keys]
        for index, _, projection, z in project_layer(states(key), train, folds, wanted_here):
            projected[index][key] = z
            if index == 0:
                projections[key] = projection
    rows = [fit_rows(outcomes, train, folds, config.seed, index) for index in range(len(chosen))]
    return [
        Fit(concatenate_features([projected[index][key] for key in layer_keys]), *rows[index])
        for index, layer_keys in enumerate(chosen)
    ], tuple(projections[key] for key in chosen[0])


def project_layer(
    x: Float[np.ndarray, "queries hidden"], train: np.ndarray, folds: np.ndarray, wanted: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, Projection, np.ndarray]]:
    """(fit, k, projection, all queries projected) for pairs (fit, k): fit 0 is the whole training split, 1 + f without
    fold f."""
    moments = fold_moments(x[train], folds)
    total = sum(moments[1:], moments[0])
    for index, k in wanted:
        projection = fit_projection(total - moments[index - 1] if index else total, k)
        yield index, k, projection, projection(x)


def fit_rows(
    outcomes: Outcomes, train: np.ndarray, folds: np.ndarray, seed: int, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows to learn from, rows that early stopping watches) of a fit, by its index."""
    rows = train[folds != index - 1] if index else train
    validation = make_folds(outcomes, rows, seed + 1, VALIDATION_FOLDS) == 0
    return rows[~validation], rows[validation]


def concatenate_features(parts: Sequence[np.ndarray]) -> Float[np.ndarray, "queries features"]:
    """Eq. 1: the projected blocks side by side, float32."""
    return np.concatenate(parts, axis=1, dtype=np.float32)


def held_out_rows(outcomes: Outcomes, split: Split, folds: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(queries whose held-out predictions calibrate, their folds): the training part's, else the calibration part's."""
    if len(split.calibration):
        return split.calibration, make_folds(outcomes, split.calibration, seed, N_FOLDS)
    return split.train, folds


def held_out_probabilities(
    ensembles: Sequence[Ensemble], fits: Sequence[Fit], rows: np.ndarray, parts: np.ndarray
) -> Float[np.ndarray, "rows models"]:
    """Of each query of `rows`, by the fit without its fold; by the only fit where there is one."""
    if len(fits) == 1:
        return ensembles[0].probabilities(fits[0].features[rows])
    p = np.empty((len(rows), ensembles[0].layers[-1][1].shape[1]))
    for fold, (ensemble, fit) in enumerate(zip(ensembles[1:], fits[1:], strict=True)):
        p[parts == fold] = ensemble.probabilities(fit.features[rows[parts == fold]])
    return p


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _encoders_read(encoders: Mapping[str, EncoderConfig], layer_keys: Sequence[LayerKey]) -> dict[str, EncoderConfig]:
    """The encoders' configurations cut down to what `layer_keys` read: no block above the highest layer is ever run."""
    read = {}
    for fingerprint in sorted({key.encoder for key in layer_keys}):
        own = [key for key in layer_keys if key.encoder == fingerprint]
        read[fingerprint] = encoders[fingerprint].model_copy(
            update={
                "device": "auto",
                "layers": tuple(sorted({key.layer for key in own})),
                "poolings": tuple(sorted({key.pooling for key in own})),
            }
        )
    return read
