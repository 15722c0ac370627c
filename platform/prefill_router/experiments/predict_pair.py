"""Predictions of two checkpoints on queries that neither of them was trained on.

In: the candidate's and the champion's routers, signals of one outcomes table, and the outcomes that each was trained
on. Out: `Pair`: `Predictions` with the routers `candidate` and `champion`, on the candidate's test queries without
those of the champion's training and calibration parts. Costs are those of the candidate, with median output lengths:
a difference must not come from prices. Queries match by id, by prompt, or by group.
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
from prefill_router.outcomes.table import Outcomes, load_outcomes
from prefill_router.routing.config import FitConfig
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
    """The queries of `outcomes` that are in the training or calibration part of the router.

    A query counts as seen if its id, prompt or group is in these parts. `left_out` are queries without states, which
    training may have left out. Raises InputError if no table of `trained_on` has the outcomes of the training.
    """
    trained = _training_outcomes(router, trained_on, left_out)
    fit = FitConfig.recorded(router.manifest["fit"])
    split = split_queries(trained, fit.seed, fit.scheme)
    known = trained.take(np.concatenate([split.train, split.calibration]))
    ids, prompts, groups = set(known.query_ids), set(known.prompt_digests), set(known.groups)
    of_query = zip(outcomes.query_ids, outcomes.prompt_digests, outcomes.groups, strict=True)
    return np.array([q in ids or p in prompts or g in groups for q, p, g in of_query], dtype=bool)


def _training_outcomes(router: Router, trained_on: Sequence[Path], left_out: Sequence[str]) -> Outcomes:
    """The outcomes with the digest in the router's manifest."""
    wanted = router.manifest["outcomes_digest"]
    for path in trained_on:
        try:
            outcomes = load_outcomes(path, router.pool)
        except InputError:  # a table without a model of this router's pool
            continue
        encoded = ~np.isin(outcomes.query_ids.astype(str), list(left_out))
        for one in (outcomes.take(np.flatnonzero(encoded)), outcomes):
            if one.digest() == wanted:
                return one
    raise InputError(
        f"outcomes: checkpoint {router.id} was trained on none of {', '.join(map(str, trained_on))}, so the queries "
        "of its training are unknown; give the outcomes of its training with --trained-on"
    )
