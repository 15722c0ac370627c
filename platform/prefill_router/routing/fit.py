"""Fitting a router: layers, projections, trunk and calibration, each without seeing what it is judged on.

In: outcomes, a split, states of the candidate blocks, the encoders' token counts. Out: a `FittedRouter`: the router,
and the predictions of the training (or calibration) queries that were made without them.

Nesting (EQUATIONS.md, SharedTrunkNet): one partition of the training queries into folds. For the fit without fold f
everything is chosen and fitted on the other folds: layer, scaler, PCA, ensemble, whose early stopping watches a slice
of those other folds. Platt scaling then sees only predictions made this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field

from prefill_router.errors import InputError
from prefill_router.outcomes.splits import Scheme, Split, make_folds
from prefill_router.outcomes.table import Outcomes
from prefill_router.pool import Pool
from prefill_router.prefill.encoder import EncoderConfig, parse_column
from prefill_router.routing import policy
from prefill_router.routing.calibration import fit_platt
from prefill_router.routing.cost import CostModel, fit_costs
from prefill_router.routing.ensemble import Ensemble
from prefill_router.routing.router import Router
from prefill_router.routing.trunk import Fit, TrunkConfig, train_ensembles
from prefill_router.signals.geometry import labelled_both
from prefill_router.signals.probe import (
    Block,
    ProbeScores,
    Selection,
    States,
    Strategy,
    auc_per_model,
    select,
    unique_blocks,
)
from prefill_router.signals.projection import Projection, fit_projection, fold_moments
from prefill_router.signals.search import search_layers

LAMBDAS = np.arange(101) / 100
N_FOLDS = 5
WATCHED_SHARE = 10  # early stopping watches one query in ten of a fit's own training rows


class FitConfig(BaseModel):
    """How a router is fitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Annotated[int, Field(ge=0, description="of split, folds and ensemble")] = 0
    scheme: Annotated[Scheme, Field(description="85/15 calibrates out of fold, 75/10/15 on its calibration part"
                                    )] = "85/15"
    strategy: Annotated[Strategy, Field(description="how each target's layer is chosen")] = "cv"
    fixed: Annotated[str | tuple[str, ...] | None,
                     Field(description="with strategy fixed: last_L4, or one such name per target")] = None
    each_pooling: Annotated[bool, Field(description="each target gets its best layer of every pooling, not only its "
                                                    "best block")] = True
    components: Annotated[int, Field(ge=1, description="PCA components k of each block")] = 64
    trunk: TrunkConfig = TrunkConfig()


@dataclass(frozen=True)
class FittedRouter:
    """`held_out_p` [queries, models] holds calibrated predictions made without the query; NaN on other queries."""

    router: Router
    selection: Selection
    scores: Mapping[Block, ProbeScores]
    held_out_p: Float[np.ndarray, "queries models"]


def check_two_classes(outcomes: Outcomes, train: Int[np.ndarray, " train"]) -> None:
    """Raises InputError naming a model whose training labels are all equal."""
    both = labelled_both(outcomes.correct[train])
    for name, fine, labels in zip(outcomes.models, both, outcomes.correct[train].T, strict=True):
        if not fine:
            values = sorted({int(value) for value in labels[~np.isnan(labels)]})
            raise InputError(f"outcomes: the training labels of {name} are {values or 'all missing'}; both 0 and 1 are "
                             "needed to learn from: leave the model out of the pool or add outcomes")


def fit_router(pool: Pool, outcomes: Outcomes, split: Split, blocks: Sequence[Block], states: States,
               n_tokens: Mapping[str, Int[np.ndarray, " queries"]], encoders: Mapping[str, EncoderConfig],
               config: FitConfig, lineage: Mapping[str, Any], progress: bool = False) -> FittedRouter:
    """Fits on `split.train`; the test part is not looked at.

    `states(block)` gives [queries, hidden] for all queries in the outcomes' order, `n_tokens` each encoder's counts of
    them. Raises InputError for a target of one class, or a fixed block that is not among `blocks`.
    """
    train = split.train
    check_two_classes(outcomes, train)
    folds = make_folds(outcomes, train, config.seed, N_FOLDS)
    scores, selection = choose_layers(outcomes, train, folds, blocks, states, config, progress)
    held_out_by_fold = config.scheme == "85/15"
    wanted = [selection.blocks, *(selection.blocks_without if held_out_by_fold else ())]
    fits, maps = _project(wanted, outcomes, train, folds, states, config)
    ensembles = train_ensembles(fits, outcomes.correct, config.trunk, config.seed,
                                progress="training" if progress else None)
    raw, rows = (_out_of_fold(ensembles[1:], fits[1:], train, folds, outcomes.correct.shape), train) \
        if held_out_by_fold else (ensembles[0].probabilities(fits[0].features), split.calibration)
    platt = fit_platt(raw[rows], outcomes.correct[rows])
    held_out = np.full(raw.shape, np.nan)
    held_out[rows] = platt(raw[rows])
    chosen = unique_blocks(selection.blocks)
    counts = n_tokens[chosen[0].encoder]
    costs = fit_costs(pool, outcomes, train, counts)
    router = Router(pool=pool, encoders=_encoders_read(encoders, chosen), blocks=chosen, projections=maps,
                    ensemble=ensembles[0], platt=platt, costs=costs,
                    chosen_lambda=best_lambda(held_out, outcomes, rows, costs, counts),
                    manifest={**lineage, "fit": config.model_dump(mode="json"),
                              "target_blocks": {name: [[block.encoder, block.column] for block in own] for name, own in
                                                zip(pool.names, selection.blocks, strict=True)},
                              "layer_scores": [{"encoder": block.encoder, "pooling": block.pooling,
                                                "layer": block.layer, "auc": _numbers(score.auc),
                                                "fisher_j": _numbers(score.fisher)} for block, score in
                                               scores.items()]})
    return FittedRouter(router, selection, scores, held_out)


def held_out_metrics(fitted: FittedRouter, outcomes: Outcomes) -> dict[str, float]:
    """`held_out_auc` and `held_out_brier`, means over models, and `chosen_lambda`: no test query enters."""
    rows = np.isfinite(fitted.held_out_p).all(axis=1)
    p, correct = fitted.held_out_p[rows], outcomes.correct[rows]
    return {"held_out_auc": float(np.nanmean(auc_per_model(correct, p))),
            "held_out_brier": float(np.nanmean(np.nanmean(np.square(p - correct), axis=0))),
            "chosen_lambda": fitted.router.chosen_lambda}


def choose_layers(outcomes: Outcomes, train: np.ndarray, folds: np.ndarray, blocks: Sequence[Block], states: States,
                  config: FitConfig, progress: bool) -> tuple[dict[Block, ProbeScores], Selection]:
    """Probes every candidate on the training queries (none under `fixed`) and chooses one per target."""
    if config.strategy == "fixed":
        chosen = fixed_blocks(config.fixed, blocks, outcomes.models)
        return {}, Selection(chosen, (chosen,) * N_FOLDS)
    found = search_layers(blocks, lambda block: states(block)[train], outcomes.correct[train], folds,
                          [config.components], with_auc=config.strategy == "cv", nested=config.scheme == "85/15",
                          progress="layer search" if progress else None)
    scores = {block: searched.at(config.components) for block, searched in found.items()}
    return scores, select(scores, config.strategy, outcomes.models, config.each_pooling)


def fixed_blocks(names: str | Sequence[str] | None, blocks: Sequence[Block], models: Sequence[str]
                 ) -> tuple[tuple[Block, ...], ...]:
    """The blocks named, one per target; a single name stands for all.

    Raises InputError for a name that is not there or that several encoders share.
    """
    if names is None:
        raise InputError("fixed: strategy `fixed` needs a layer, as in last_L4, or one per target")
    names = (names,) * len(models) if isinstance(names, str) else tuple(names)
    if len(names) != len(models):
        raise InputError(f"fixed: got {len(names)} layers for {len(models)} targets; give one for all or one for each")
    known = {block.column: block for block in blocks}
    for name in names:
        parse_column(name)
        if name not in known:
            raise InputError(f"fixed: {name!r} is not in the activations; they hold {', '.join(known)}")
        if sum(block.column == name for block in blocks) > 1:
            raise InputError(f"fixed: {name!r} is a column of several encoders; give the activations of one")
    return tuple((known[name],) for name in names)


def best_lambda(p: Float[np.ndarray, "queries models"], outcomes: Outcomes, rows: Int[np.ndarray, " part"],
                costs: CostModel, n_tokens: Int[np.ndarray, " queries"]) -> float:
    """The lambda of the 101-point sweep that is most accurate on held-out predictions; of equals the cheapest.

    0 where no query has all its labels.
    """
    rows = rows[outcomes.complete[rows]]
    if not len(rows):
        return 0.0
    cost = costs.estimate(n_tokens[rows], outcomes.input_tokens[rows])
    chat, correct, at = costs.normalise(cost), outcomes.correct[rows], np.arange(len(rows))
    points = []
    for lam in LAMBDAS:
        chosen = policy.choose(p[rows], cost, chat, lam)
        points.append((-correct[at, chosen].mean(), cost[at, chosen].mean(), lam))
    return float(min(points)[2])


def _project(wanted: Sequence[Sequence[Sequence[Block]]], outcomes: Outcomes, train: np.ndarray, folds: np.ndarray,
             states: States, config: FitConfig) -> tuple[list[Fit], tuple[Projection, ...]]:
    """Each fit's features, by projections fitted on its own training rows; and the first fit's projections.

    `wanted[0]` are the whole training split's blocks, `wanted[1 + f]` those chosen without fold f. Every block is
    read once.
    """
    chosen = [unique_blocks(blocks) for blocks in wanted]
    projected: list[dict[Block, np.ndarray]] = [{} for _ in chosen]
    projections: dict[Block, Projection] = {}
    for block in unique_blocks(chosen):
        x = states(block)
        moments = fold_moments(x[train], folds)
        total = sum(moments[1:], moments[0])
        for index, blocks in enumerate(chosen):
            if block in blocks:
                projection = fit_projection(total - moments[index - 1] if index else total, config.components)
                projected[index][block] = projection(x)
                if index == 0:
                    projections[block] = projection
    fits = []
    for index, blocks in enumerate(chosen):
        rows = train[folds != index - 1] if index else train
        watched = make_folds(outcomes, rows, config.seed + 1, WATCHED_SHARE) == 0
        features = np.concatenate([projected[index][block] for block in blocks], axis=1, dtype=np.float32)
        fits.append(Fit(features, rows[~watched], rows[watched]))
    return fits, tuple(projections[block] for block in chosen[0])


def _out_of_fold(ensembles: Sequence[Ensemble], fits: Sequence[Fit], train: np.ndarray, folds: np.ndarray,
                 shape: tuple[int, int]) -> np.ndarray:
    p = np.full(shape, np.nan)
    for fold, (ensemble, fit) in enumerate(zip(ensembles, fits, strict=True)):
        rows = train[folds == fold]
        p[rows] = ensemble.probabilities(fit.features[rows])
    return p


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _encoders_read(encoders: Mapping[str, EncoderConfig], blocks: Sequence[Block]) -> dict[str, EncoderConfig]:
    """The encoders' configurations cut down to what `blocks` read: no block above the highest layer is ever run."""
    read = {}
    for fingerprint in sorted({block.encoder for block in blocks}):
        own = [block for block in blocks if block.encoder == fingerprint]
        read[fingerprint] = encoders[fingerprint].model_copy(update={
            "device": "auto", "layers": tuple(sorted({block.layer for block in own})),
            "poolings": tuple(sorted({block.pooling for block in own}))})
    return read
