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
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from prefill_router.errors import InputError
from prefill_router.outcomes.splits import Split, make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.pool import Pool
from prefill_router.prefill.config import EncoderConfig
from prefill_router.routing import policy
from prefill_router.routing.calibration import calibrated_across, fit_calibrator
from prefill_router.routing.candidates import candidate_layers
from prefill_router.routing.checkpoint import save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.cost import CostModel, fit_costs
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.layers import N_FOLDS, choose_layers
from prefill_router.routing.lengths import choose_lengths
from prefill_router.routing.policy import Margin
from prefill_router.routing.router import Router
from prefill_router.routing.stack import Part, Stack, StackPart, context_of, fit_parts, fit_regression
from prefill_router.routing.trunk import Fit, train_ensembles
from prefill_router.signals.geometry import labelled_both
from prefill_router.signals.join import Signals
from prefill_router.signals.layer_key import LayerKey, LayerStates, unique_layer_keys
from prefill_router.signals.novelty import Novelty, Spread
from prefill_router.signals.projection import Projection, concatenate_features, project_layer
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.signals.selection import ProbeScores, Selection

VALIDATION_FOLDS = 10  # one in ten of the training rows of a fit is a validation row of early stopping


@dataclass(frozen=True)
class FittedRouter:
    """A router, its inputs and its held-out predictions.

    `held_out_p`: confidences of the training queries (scheme 85/15) or of the calibration queries (scheme 75/10/15)
    from trunks, parts of the stack, a regression and a calibrator that were fitted without their labels; NaN for all
    other queries. The calibrator of a fold is fitted on stacked probabilities whose regressions saw the fold's labels.
    `held_out_figures`: `held_out_auc` and `held_out_brier` of these confidences, means over models.
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


@dataclass(frozen=True)
class TrainedTrunks:
    """Trained ensembles, and their inputs.

    `folds`: of the training queries. `fits` and `ensembles`: the first on all training queries, the others without one
    fold each (none under 75/10/15). `raw`: uncalibrated probabilities of the held-out queries `rows`, whose folds are
    `row_folds`.
    """

    signals: Signals
    pool: Pool
    split: Split
    selection: Selection
    scores: Mapping[LayerKey, ProbeScores]
    folds: Int[np.ndarray, " train"]
    fits: tuple[Fit, ...]
    projections: tuple[Projection, ...]
    novelty: Novelty
    ensembles: tuple[Ensemble, ...]
    rows: Int[np.ndarray, " rows"]
    row_folds: Int[np.ndarray, " rows"]
    raw: Float[np.ndarray, "rows models"]


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
    return finish_router(train_trunks(signals, pool, split, config, progress), config, lineage)


def train_trunks(
    signals: Signals, pool: Pool, split: Split, config: FitConfig, progress: bool = False
) -> TrainedTrunks:
    """Chooses layers and trains the ensembles of all folds. Arguments and errors are those of `fit_router`."""
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
        fits, outcomes.shares, config.trunk, config.seed, progress="training" if progress else None
    )
    rows, row_folds = calibration_queries(outcomes, split, folds, config.seed)
    raw = held_out_probabilities(ensembles, fits, rows, row_folds)
    return TrainedTrunks(
        signals,
        pool,
        split,
        selection,
        scores,
        folds,
        tuple(fits),
        maps,
        novelty,
        tuple(ensembles),
        rows,
        row_folds,
        raw,
    )


def finish_router(trained: TrainedTrunks, config: FitConfig, lineage: Mapping[str, Any]) -> FittedRouter:
    """The router of trained trunks: stack, calibration, output lengths, margin and lambda.

    `config` may differ from that of the trunks in `stack`, `calibrator`, `lengths` and `margin`.
    """
    signals, pool, split, selection = trained.signals, trained.pool, trained.split, trained.selection
    outcomes, train, folds, fits = signals.outcomes, split.train, trained.folds, trained.fits
    rows, row_folds, raw = trained.rows, trained.row_folds, trained.raw
    stack = None
    if config.stack:
        stack, raw = _fit_stack(config.stack, raw, fits, outcomes, train, folds, rows, row_folds)
    calibrator = fit_calibrator(config.calibrator, raw, outcomes.correct[rows])
    held_out = np.full(outcomes.correct.shape, np.nan)
    held_out[rows] = calibrated_across(
        partial(fit_calibrator, config.calibrator), raw, outcomes.correct[rows], row_folds
    )
    chosen = unique_layer_keys(selection.layer_keys)
    counts = signals.n_tokens[chosen[0].encoder]
    costs = fit_costs(pool, outcomes, train, counts)
    lengths = None
    if config.lengths == "auto":
        lengths = choose_lengths(fits[0].features, outcomes, train, folds, rows, held_out[rows], costs, counts)
    output_tokens = None if lengths is None else lengths(fits[0].features)
    margin = None
    if config.margin:
        cost = costs.estimate(counts, outcomes.input_tokens, outcomes.prompt_bytes, output_tokens)
        cost_norm = costs.normalise(cost)
        means = policy.training_means(outcomes.correct[train], cost_norm[train])
        margin = policy.fit_margin(held_out[rows], outcomes.correct[rows], cost[rows], cost_norm[rows], means)
    router = Router(
        pool=pool,
        encoders=_encoders_read(signals.encoders, chosen),
        layer_keys=chosen,
        projections=trained.projections,
        ensemble=trained.ensembles[0],
        calibrator=calibrator,
        costs=costs,
        chosen_lambda=best_lambda(held_out, outcomes, rows, costs, counts, margin, output_tokens),
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
                for key, score in trained.scores.items()
            ],
        },
        novelty=trained.novelty,
        stack=stack,
        margin=margin,
        lengths=lengths,
    )
    figures = held_out_figures(held_out[rows], outcomes.correct[rows])
    return FittedRouter(router, selection, trained.scores, held_out, figures, signals, split)


def _fit_stack(
    names: Sequence[StackPart],
    raw: Float[np.ndarray, "rows models"],
    fits: Sequence[Fit],
    outcomes: Outcomes,
    train: Int[np.ndarray, " train"],
    folds: Int[np.ndarray, " train"],
    rows: Int[np.ndarray, " rows"],
    row_folds: Int[np.ndarray, " rows"],
) -> tuple[Stack, Float[np.ndarray, "rows models"]]:
    """The stack of fit 0, and the stacked probabilities of `rows`, from regressions without the query's fold.

    The regression is fitted on context from parts without the query's fold, or from the only fit.
    """

    def parts_of(index: int) -> tuple[Part, ...]:
        own = train[folds != index - 1] if index else train
        return fit_parts(names, fits[index].features[own], outcomes.correct[own], outcomes.benchmarks[own])

    if len(np.unique(outcomes.benchmarks[train])) == 1:  # there is no domain to predict
        names = [name for name in names if name != "domain"]
    parts = parts_of(0)
    if len(fits) == 1:
        context = context_of(parts, fits[0].features[rows])
    else:
        pieces = [
            context_of(parts_of(1 + fold), fits[1 + fold].features[rows[row_folds == fold]]) for fold in range(N_FOLDS)
        ]
        context = [np.empty(raw.shape) for _ in pieces[0]]
        for fold, piece in enumerate(pieces):
            for whole, own in zip(context, piece, strict=True):
                whole[row_folds == fold] = own
    regression, stacked = fit_regression(raw, context, outcomes.correct[rows], row_folds)
    return Stack(parts, regression), stacked


def held_out_figures(
    p: Float[np.ndarray, "queries models"], correct: Float[np.ndarray, "queries models"]
) -> dict[str, float]:
    """`held_out_auc` and `held_out_brier` of held-out predictions, means over models."""
    return {
        "held_out_auc": float(np.nanmean(auc_per_model(correct, p))),
        "held_out_brier": float(np.nanmean(np.nanmean(np.square(p - correct), axis=0))),
    }


def best_lambda(
    p: Float[np.ndarray, "queries models"],
    outcomes: Outcomes,
    rows: Int[np.ndarray, " part"],
    costs: CostModel,
    n_tokens: Int[np.ndarray, " queries"],
    margin: Margin | None = None,
    output_tokens: Float[np.ndarray, "queries models"] | None = None,
) -> float:
    """The lambda of the sweep with the highest accuracy on held-out predictions `p[rows]`; ties: the lowest mean cost.

    `output_tokens` are the expected output tokens of all queries; None: the models' medians.
    Only queries with complete labels count; without any, lambda is 0.
    """
    rows = rows[outcomes.complete[rows]]
    if not len(rows):
        return 0.0
    expected = None if output_tokens is None else output_tokens[rows]
    cost = costs.estimate(n_tokens[rows], outcomes.input_tokens[rows], outcomes.prompt_bytes[rows], expected)
    cost_norm, correct, at = costs.normalise(cost), outcomes.correct[rows], np.arange(len(rows))
    points = []
    for lam in policy.LAMBDAS:
        chosen = policy.choose(p[rows], cost, cost_norm, lam, margin=margin)
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
        # `pop` frees the parts of each fit, of the size of its features.
        Fit(concatenate_features([projected[index].pop(key) for key in layer_keys]), *rows[index])
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
