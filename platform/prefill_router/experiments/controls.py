"""Controls of an evaluation: trunks that cannot know the labels, and a record of truncated prompts.

In: a router, joined signals and the split on which the router was fitted. Out: test predictions of control trunks, and
a table of the prompts as the router's encoders read them. metrics/controls.py computes the figures.

A control trunk has the settings, the training rows and the validation rows of the router's trunk. `shuffled_labels`
reads the router's features, and the label rows of the training queries are permuted: a query gets the labels that
another query has for all models, so that the correlation between models and the pattern of missing labels stay.
`random_features` reads independent normal numbers with the standard deviations of the router's features. Layers,
projections and calibration are not refitted: they change AUC little and cost most of the training time.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from prefill_router.metrics.controls import RANDOM, SHUFFLED, TRUNCATION
from prefill_router.metrics.predictions import Predictions, RouterPredictions
from prefill_router.outcomes.splits import Split
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_rows
from prefill_router.routing.router import Router
from prefill_router.routing.trunk import Fit, train_ensembles
from prefill_router.signals.join import Signals

REPEATS = 5


def predict_controls(
    router: Router, signals: Signals, split: Split, predictions: Predictions, progress: bool = False
) -> Predictions:
    """`predictions` with REPEATS control trunks of each kind in place of its routers, named `KIND NUMBER`.

    Every repeat has its own permutation or features, and an ensemble of one member. p is not calibrated.
    """
    outcomes, fit = signals.outcomes, FitConfig.recorded(router.manifest["fit"])
    features = router.features(signals.states)
    train, test, rng = features[split.train], features[split.test], np.random.default_rng(fit.seed)
    scale = train.std(axis=0)
    rows = fit_rows(outcomes, split.train, np.zeros(len(split.train)), fit.seed, 0)
    own = [np.searchsorted(split.train, part) for part in rows]  # positions within the training queries
    trunk = fit.trunk.model_copy(update={"members": 1, "kept": 1})

    def normal(n: int) -> np.ndarray:
        return (rng.standard_normal((n, len(scale))) * scale).astype(np.float32)

    routers = {}
    for kind in (SHUFFLED, RANDOM):
        # Permuted rows of the features are permuted rows of the labels, and each fit has its own features.
        inputs = [
            (train[rng.permutation(len(train))], test) if kind == SHUFFLED else (normal(len(train)), normal(len(test)))
            for _ in range(REPEATS)
        ]
        label = f"control, {kind.replace('_', ' ')}" if progress else None
        fits = [Fit(known, *own) for known, _ in inputs]
        ensembles = train_ensembles(fits, outcomes.shares[split.train], trunk, fit.seed, progress=label)
        for number, (ensemble, (_, unknown)) in enumerate(zip(ensembles, inputs, strict=True)):
            routers[f"{kind} {number + 1}"] = RouterPredictions(ensemble.probabilities(unknown), 0.0)
    return Predictions(
        predictions.query_ids,
        predictions.benchmarks,
        predictions.groups,
        predictions.models,
        predictions.correct,
        predictions.cost,
        predictions.cost_norm,
        routers,
    )


def truncation(router: Router, signals: Signals, split: Split) -> pa.Table:
    """One row of TRUNCATION per encoder of the router and query."""
    outcomes = signals.outcomes
    part = np.full(len(outcomes), "train", dtype=object)
    part[split.calibration], part[split.test] = "calibration", "test"
    tables = []
    for fingerprint in router.encoders:
        dataset, ids = signals.activations[fingerprint], list(outcomes.query_ids)
        columns = {
            "encoder": [fingerprint] * len(ids),
            "query_id": ids,
            "part": part.tolist(),
            "n_tokens": dataset.n_tokens(ids),
            "n_dropped": dataset.n_dropped(ids),
            "prompt_digest": outcomes.prompt_digests,
            "tokens_digest": dataset.tokens_digests(ids),
        }
        tables.append(pa.table(columns, schema=TRUNCATION))
    return pa.concat_tables(tables)
