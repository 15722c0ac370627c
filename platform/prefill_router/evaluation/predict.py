"""The prefill router and its baselines on one test split, under one cost model: the input of every figure.

In: a router, joined signals, the split it was fitted on. Out: `Predictions`, and the settings that each baseline was
tuned to. The baselines are fitted here, on the training part alone, with the router's own folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefill_router.errors import InputError
from prefill_router.evaluation.predictions import Predictions, RouterPredictions
from prefill_router.outcomes.splits import Split, make_folds
from prefill_router.routing.fit import N_FOLDS, best_lambda
from prefill_router.routing.router import Router
from prefill_router.semantic.baselines import category_prior, embed, knn_vote, unified_mlp
from prefill_router.signals.join import Signals

PREFILL = "prefill"


def predict_test(router: Router, signals: Signals, split: Split, *, baselines: bool = True, progress: bool = False
                 ) -> tuple[Predictions, dict[str, Mapping[str, Any]]]:
    """Confidences of every router on the test queries; est. costs by the router's cost model, Eq. 2."""
    outcomes, test = signals.outcomes, split.test
    if missing := [name for name in router.encoders if name not in signals.activations]:
        raise InputError(f"activations: the checkpoint reads encoder {missing[0]}, given are "
                         f"{', '.join(signals.activations)}; prefill with the encoder that the checkpoint names")
    n_tokens = signals.n_tokens[router.counting_encoder]
    p, _ = router.confidences(router.features(signals.states))
    routers = {PREFILL: RouterPredictions(p[test], router.chosen_lambda)}
    settings: dict[str, Mapping[str, Any]] = {}
    if baselines:
        seed = int(router.manifest["fit"]["seed"])
        folds = make_folds(outcomes, split.train, seed, N_FOLDS)
        embedding = embed(signals.states(signals.final_block()), split.train)
        fitted = {"category_prior": category_prior(outcomes, split.train, folds),
                  "knn": knn_vote(outcomes, split.train, folds, embedding),
                  "unified_mlp": unified_mlp(outcomes, split.train, folds, embedding, seed, progress)}
        for name, baseline in fitted.items():
            lam = best_lambda(baseline.held_out_p, outcomes, split.train, router.costs, n_tokens)
            routers[name] = RouterPredictions(baseline.p[test], lam)
            settings[name] = baseline.settings
    cost = router.costs.estimate(n_tokens[test], outcomes.input_tokens[test])
    predictions = Predictions(outcomes.query_ids[test], outcomes.benchmarks[test], outcomes.groups[test],
                              outcomes.models, outcomes.correct[test], cost, router.costs.normalise(cost), routers)
    return predictions, settings
