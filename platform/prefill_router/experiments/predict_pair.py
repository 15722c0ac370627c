"""Predictions of two checkpoints on queries that neither of them was trained on.

In: the candidate's and the champion's routers, signals of one outcomes table, and the outcomes that each was trained
on, with those of its onboardings. Out: `Pair`: `Predictions` with the routers `candidate` and `champion`, on the
candidate's test queries without those of the champion's training and calibration parts and of its onboardings. Costs
are those of the candidate, with median output lengths: a difference must not come from prices. Queries match by id, by
prompt, or by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from prefill_router.errors import InputError
from prefill_router.experiments.predict import PREFILL, check_encoders, predict_test
from prefill_router.metrics.compare import take_models
from prefill_router.metrics.paired import CANDIDATE, CHAMPION
from prefill_router.metrics.predictions import Predictions, RouterPredictions
from prefill_router.outcomes.splits import Split, split_queries
from prefill_router.outcomes.table import Outcomes, pivot, read_outcomes
from prefill_router.routing.config import FitConfig
from prefill_router.routing.repool import TRAINED
from prefill_router.routing.router import Router
from prefill_router.signals.join import Signals


@dataclass(frozen=True)
class Pair:
    """Predictions of both routers on the models that both pools have.

    `test` is the number of the candidate's test queries, `seen` how many of them the champion was trained on; these
    are left out.
    """

    predictions: Predictions
    test: int
    seen: int


def predict_pair(candidate: Router, champion: Router, signals: Signals, trained_on: Sequence[Path]) -> Pair:
    """Predicts with both routers. `signals` has the models of the candidate's pool.

    `trained_on`: outcomes tables, among them those that the routers were trained on. Raises InputError if a training
    part is unknown, an encoder has no activations, the pools share no model, or no query remains.
    """
    outcomes = signals.outcomes
    for router in (candidate, champion):
        check_encoders(router, signals.activations)
    shared = tuple(name for name in candidate.pool.names if name in champion.pool.names)
    if not shared:
        raise InputError("pool: candidate and champion have no model in common; nothing can be compared")
    own, theirs = (seen_in_training(router, outcomes, trained_on, signals.left_out) for router in (candidate, champion))
    test = np.flatnonzero(~own)
    rows = np.flatnonzero(~own & ~theirs)
    if not len(rows):
        raise InputError(
            f"outcomes: the champion was trained on all {len(test):,} test queries of the candidate; train both with "
            "one fit.seed, or add outcomes that neither has seen"
        )
    split = Split(np.flatnonzero(own), np.array([], dtype=np.int64), rows)
    predictions = predict_test(candidate, signals, split, baselines=False)[0].with_median_costs()
    p, _ = champion.confidences(champion.features(lambda key: signals.states(key, rows)))
    predictions = take_models(predictions, shared)
    columns = champion.pool.indices(list(shared))
    routers = {
        CHAMPION: RouterPredictions(
            p[:, columns],
            champion.chosen_lambda,
            margin_bonus=0.0 if champion.margin is None else champion.margin.bonus,
        ),
        CANDIDATE: predictions.routers[PREFILL],
    }
    return Pair(replace(predictions, routers=routers), len(test), len(test) - len(rows))


def seen_in_training(
    router: Router, outcomes: Outcomes, trained_on: Sequence[Path], left_out: Sequence[str] = ()
) -> Bool[np.ndarray, " queries"]:
    """The queries of `outcomes` that are in the training or calibration part of the router, or of an onboarding.

    A query counts as seen if its id, prompt or group is in these parts, or is that of a labelled query of a model of
    the pool that was added later. `left_out` are queries without states, which training may have left out. Raises
    InputError if no table of `trained_on` has the outcomes of the training, or the labels of an added model.
    """
    trained = _training_outcomes(router, trained_on, left_out)
    fit = FitConfig.recorded(router.manifest["fit"])
    split = split_queries(trained, fit.seed, fit.scheme)
    parts = [trained.take(np.concatenate([split.train, split.calibration]))]
    parts += _onboarding_outcomes(router, trained_on, left_out)
    ids, prompts, groups = (
        {value for part in parts for value in getattr(part, name)} for name in ("query_ids", "prompt_digests", "groups")
    )
    of_query = zip(outcomes.query_ids, outcomes.prompt_digests, outcomes.groups, strict=True)
    return np.array([q in ids or p in prompts or g in groups for q, p, g in of_query], dtype=bool)


def _training_outcomes(router: Router, trained_on: Sequence[Path], left_out: Sequence[str]) -> Outcomes:
    """The outcomes with the digest in the router's manifest, of the models that the trunk was trained on."""
    names = router.manifest.get(TRAINED)
    if names is None:
        if router.changed is not None:
            raise InputError(
                f"checkpoint: {router.id} has other models than its training, and an earlier release did not record "
                "which; make it again with jobs.onboard or jobs.repool from the checkpoint of the training"
            )
        names = router.pool.names
    found = _with_digest(router.manifest["outcomes_digest"], names, trained_on, left_out)
    if found is None:
        raise InputError(
            f"outcomes: checkpoint {router.id} was trained on none of {', '.join(map(str, trained_on))}, so the "
            "queries of its training are unknown; give the outcomes of its training with --trained-on"
        )
    return found


def _onboarding_outcomes(router: Router, trained_on: Sequence[Path], left_out: Sequence[str]) -> list[Outcomes]:
    """The labelled queries of each model of the pool that was added after the training."""
    records = {one["model"]: one for one in router.manifest.get("onboarded", [])}  # the last one of each model
    found = []
    for name, record in records.items():
        if name not in router.pool.names:
            continue
        labelled = _with_digest(record["outcomes_digest"], [name], trained_on, left_out)
        if labelled is None:
            raise InputError(
                f"outcomes: none of {', '.join(map(str, trained_on))} has the labels with which {name} was added to "
                f"checkpoint {router.id}; give the outcomes of jobs.onboard with --trained-on"
            )
        found.append(labelled)
    return found


def _with_digest(digest: str, models: Sequence[str], paths: Sequence[Path], left_out: Sequence[str]) -> Outcomes | None:
    """The first outcomes of these models with this digest: all, labelled, or labelled with states."""
    for path in paths:
        try:
            outcomes = pivot(read_outcomes(path), models)
        except InputError:  # a table without one of the models
            continue
        encoded = ~np.isin(outcomes.query_ids.astype(str), list(left_out))
        labelled = outcomes.labelled.any(axis=1)
        for rows in (encoded, np.ones_like(encoded), encoded & labelled, labelled):
            one = outcomes.take(np.flatnonzero(rows))
            if one.digest() == digest:
                return one
    return None
