"""Fits a router: layers, projections, trunk and calibration, with held-out predictions.

In: signals (outcomes, states, token counts), a pool, a split, a configuration. Out: a `FittedRouter`: the router, and
held-out predictions of the training queries (85/15) or the calibration queries (75/10/15).

Nesting (docs/equations.md, SharedTrunkNet): one partition divides the training queries into folds. The fit without fold
f uses the other folds for everything: layer selection, scaler, PCA, ensemble, and the validation rows of early
stopping. Calibrators are fitted on predictions of queries that the predicting fit did not see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from prefill_router.routing.checkpoint import save_checkpoint
from prefill_router.routing.cost import CostModel, fit_costs
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.router import Router
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.signals.geometry import labelled_both
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey, LayerStates, unique_layer_keys
from prefill_router.signals.novelty import Novelty, Spread
from prefill_router.signals.projection import Projection, concatenate_features, project_layer
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.signals.search import search_layers
from prefill_router.signals.selection import ProbeScores, Selection, Strategy, select_layers

N_FOLDS = 5
VALIDATION_FOLDS = 10  # one in ten of the training rows of a fit is a validation row of early stopping


class FitConfig(FrozenModel):
    """Settings of `fit_router`."""

    seed: Annotated[int, Field(ge=0, description="seed of split, folds and ensemble")] = 0
    scheme: Annotated[Scheme, Field(description="85/15 calibrates out of fold, 75/10/15 on the calibration part")] = (
        "85/15"
    )
    mode: Annotated[
        Mode,
        Field(
            description="encoders of a target: auto, the encoder with the best probe; all, every encoder; single, one "
            "encoder for all targets; per_model, the map in `encoders`"
        ),
    ] = "auto"
    encoders: Annotated[
        str | dict[str, str] | None,
        Field(
            description="mode single: fingerprint or model name of the encoder; per_model: one for each target, "
            "{target: encoder}"
        ),
    ] = None
    pooling: Annotated[Pooling | None, Field(description="read only states with this pooling; none: all poolings")] = (
        None
    )
    strategy: Annotated[
        Strategy, Field(description="layer selection: cv, by AUC; fisher, by Fisher's J; fixed, the layers in `fixed`")
    ] = "cv"
    fixed: Annotated[
        str | tuple[str, ...] | None, Field(description="strategy fixed: a layer such as last_L4, or one per target")
    ] = None
    each_pooling: Annotated[
        bool, Field(description="a target reads its best layers of every pooling, not only of the best pooling")
    ] = True
    layers_per_target: Annotated[
        int,
        Field(ge=1, description="layers that a target reads: per pooling with each_pooling, per encoder in mode all"),
    ] = 1
    components: Annotated[int, Field(ge=1, description="PCA components k of each layer key")] = 64
    trunk: Annotated[TrunkConfig, Field(description="shape and training of the ensemble")] = TrunkConfig()
    calibrator: Annotated[
        CalibratorName, Field(description="map from the probability of the ensemble to the confidence")
    ] = "platt"

    @model_validator(mode="after")
    def _encoders_fit_the_mode(self) -> FitConfig:
        if self.mode in ("auto", "all") and self.encoders is not None:
            raise ValueError(
                f"encoders: got {self.encoders!r} in mode {self.mode}, which uses all encoders; set mode to single or "
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
    """A router, its inputs and its held-out predictions.

    `held_out_p`: confidences of the training queries (scheme 85/15) or of the calibration queries (scheme 75/10/15)
    from a fit that did not see them, calibrated with the router's calibrator; NaN for all other queries.
    `held_out_figures`: `held_out_auc` and `held_out_brier` of confidences whose calibrator also did not see the query.
    """

    router: Router
    selection: Selection
    scores: Mapping[LayerKey, ProbeScores]
    held_out_p: Float[np.ndarray, "queries models"]
    held_out_figures: Mapping[str, float]
    signals: Signals
    split: Split

    def save(self, folder: Path | str) -> Router:
        """Writes the checkpoint and returns the router with its id. Raises InputError as `save_checkpoint` does."""
        return save_checkpoint(self.router, folder)


def check_two_classes(outcomes: Outcomes, train: Int[np.ndarray, " train"]) -> None:
    """Raises InputError with the name of a model whose training labels are of one class or all missing."""
    both = labelled_both(outcomes.correct[train])
    for name, fine, labels in zip(outcomes.models, both, outcomes.correct[train].T, strict=True):
        if not fine:
            values = sorted({int(value) for value in labels[~np.isnan(labels)]})
            raise InputError(
                f"outcomes: the training labels of {name} are {values or 'all missing'}; both 0 and 1 are "
                "needed: leave the model out of the pool or add outcomes"
            )


def fit_router(
    signals: Signals,
    pool: Pool,
    split: Split,
    config: FitConfig,
    lineage: Mapping[str, Any],
    progress: bool = False,
) -> FittedRouter:
    """Fits a router on `split.train`. Labels of test queries are not used.

    `lineage` is stored in the checkpoint's manifest. Raises InputError for a target with training labels of one class,
    a fixed layer that is missing in the activations, or an unknown encoder or target.
    """
    outcomes, states, train = signals.outcomes, signals.states, split.train
    candidates = candidate_layers(
        signals.layer_keys, signals.encoders, outcomes.models, config.mode, config.encoders, config.pooling
    )
    check_two_classes(outcomes, train)
    folds = make_folds(outcomes, train, config.seed, N_FOLDS)
    scores, selection = choose_layers(outcomes, train, folds, candidates, states, config, progress)
    out_of_fold = config.scheme == "85/15"
    wanted = [selection.layer_keys, *(selection.layer_keys_without if out_of_fold else ())]
    fits, maps, novelty = _project(wanted, outcomes, train, folds, states, config)
    ensembles = train_ensembles(
        fits, outcomes.correct, config.trunk, config.seed, progress="training" if progress else None
    )
    rows, row_folds = calibration_queries(outcomes, split, folds, config.seed)
    raw = held_out_probabilities(ensembles, fits, rows, row_folds)
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
        novelty=novelty,
    )
    across = calibrated_across(partial(fit_calibrator, config.calibrator), raw, outcomes.correct[rows], row_folds)
    return FittedRouter(
        router, selection, scores, held_out, held_out_figures(across, outcomes.correct[rows]), signals, split
    )


def held_out_figures(
    p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]
) -> dict[str, float]:
    """`held_out_auc` and `held_out_brier` of held-out predictions, means over models."""
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
    """Scores the candidate layers on the training queries (none under `fixed`) and selects each target's layers."""
    if config.strategy == "fixed":
        return {}, select_by_config({}, config, candidates, outcomes.models)
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
    return scores, select_by_config(scores, config, candidates, outcomes.models)


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
    """The scores of every layer key on the training queries, at k components. The states are read once."""
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


def select_by_config(
    scores: Mapping[LayerKey, ProbeScores],
    config: FitConfig,
    candidates: Sequence[Sequence[LayerKey]],
    models: Sequence[str],
) -> Selection:
    """The selection by `config` from scores at its number of components; strategy `fixed` needs no scores."""
    each = config.mode == "all"
    if config.strategy == "fixed":
        chosen = fixed_layers(config.fixed, candidates, models, each)
        return Selection(chosen, (chosen,) * N_FOLDS)
    own = {key: scores[key] for key in unique_layer_keys(candidates)}
    return select_layers(own, config.strategy, models, config.each_pooling, config.layers_per_target, candidates, each)


def best_lambda(
    p: Float[np.ndarray, "queries models"],
    outcomes: Outcomes,
    rows: Int[np.ndarray, " part"],
    costs: CostModel,
    n_tokens: Int[np.ndarray, " queries"],
) -> float:
    """The lambda of the sweep with the highest accuracy on held-out predictions `p[rows]`; ties: the lowest mean cost.

    Only queries with complete labels count; without any, lambda is 0.
    """
    rows = rows[outcomes.complete[rows]]
    if not len(rows):
        return 0.0
    cost = costs.estimate(n_tokens[rows], outcomes.input_tokens[rows], outcomes.prompt_bytes[rows])
    cost_norm, correct, at = costs.normalise(cost), outcomes.correct[rows], np.arange(len(rows))
    points = []
    for lam in policy.LAMBDAS:
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
) -> tuple[list[Fit], tuple[Projection, ...], Novelty]:
    """The features of every fit, projected with its own training rows; projections and novelty of fit 0.

    `wanted[0]` are the layer keys chosen on the training split, `wanted[1 + f]` those chosen without fold f. The states
    of every layer key are read once.
    """
    chosen = [unique_layer_keys(layer_keys) for layer_keys in wanted]
    projected: list[dict[LayerKey, np.ndarray]] = [{} for _ in chosen]
    projections: dict[LayerKey, Projection] = {}
    spreads: dict[LayerKey, Spread] = {}
    distances = np.zeros(len(train))  # of each training query, from the fit without its fold
    for key in unique_layer_keys(chosen):
        x, read = states(key), key in chosen[0]
        used = [index for index, layer_keys in enumerate(chosen) if key in layer_keys]
        needed = range(N_FOLDS + 1) if read else used  # novelty needs every fold of the layer keys of fit 0
        for index, _, projection, z in project_layer(x, train, folds, [(index, config.components) for index in needed]):
            if index in used:
                projected[index][key] = z
            if not read:
                continue
            spread = Spread.of(x[train[folds != index - 1] if index else train], projection)
            if index:
                distances[folds == index - 1] += spread.distance(x[train[folds == index - 1]], projection)
            else:
                projections[key], spreads[key] = projection, spread
    rows = [fit_rows(outcomes, train, folds, config.seed, index) for index in range(len(chosen))]
    fits = [
        Fit(concatenate_features([projected[index][key] for key in layer_keys]), *rows[index])
        for index, layer_keys in enumerate(chosen)
    ]
    held_out = np.sort(distances / len(chosen[0])).astype(np.float32)
    novelty = Novelty(tuple(spreads[key] for key in chosen[0]), held_out)
    return fits, tuple(projections[key] for key in chosen[0]), novelty


def fit_rows(
    outcomes: Outcomes, train: np.ndarray, folds: np.ndarray, seed: int, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) of fit `index`: 0 uses all training rows, 1 + f leaves out fold f."""
    rows = train[folds != index - 1] if index else train
    validation = make_folds(outcomes, rows, seed + 1, VALIDATION_FOLDS) == 0
    return rows[~validation], rows[validation]


def calibration_queries(
    outcomes: Outcomes, split: Split, folds: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(queries that fit the calibrator, their folds): the calibration part, or the training part if it is empty."""
    if len(split.calibration):
        return split.calibration, make_folds(outcomes, split.calibration, seed, N_FOLDS)
    return split.train, folds


def held_out_probabilities(
    ensembles: Sequence[Ensemble], fits: Sequence[Fit], rows: np.ndarray, folds: np.ndarray
) -> Float[np.ndarray, "rows models"]:
    """Uncalibrated probabilities of `rows`, each from the fit without its fold, or from the only fit."""
    if len(fits) == 1:
        return ensembles[0].probabilities(fits[0].features[rows])
    p = np.empty((len(rows), ensembles[0].layers[-1][1].shape[1]))
    for fold, (ensemble, fit) in enumerate(zip(ensembles[1:], fits[1:], strict=True)):
        p[folds == fold] = ensemble.probabilities(fit.features[rows[folds == fold]])
    return p


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _encoders_read(encoders: Mapping[str, EncoderConfig], layer_keys: Sequence[LayerKey]) -> dict[str, EncoderConfig]:
    """Encoder configurations limited to the layers and poolings of `layer_keys`: no higher block is computed."""
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
