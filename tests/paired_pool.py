"""A made-up test split with two routers, champion and candidate, that see the truth through noise of any size."""

from __future__ import annotations

import numpy as np

from prefill_router.metrics.paired import CANDIDATE, CHAMPION
from prefill_router.metrics.predictions import Predictions, RouterPredictions
from prefill_router.routing.policy import TrainingMeans

MODELS = ("cheap", "middle", "dear")
USD = np.array([0.0001, 0.001, 0.01])
BENCHMARKS = ("arithmetic", "logic", "reading")


def two_routers(
    candidate: float = 1.0, champion: float = 1.0, n: int = 900, seed: int = 0, draw: int = 1, rare: int = 0
) -> Predictions:
    """`candidate` and `champion` are the standard deviations of the noise on the log odds.

    `seed` draws labels and the champion's noise, `draw` the candidate's noise. The first `rare` queries are of
    benchmarks with 10 queries each.
    """
    rng = np.random.default_rng(seed)
    benchmark = rng.integers(len(BENCHMARKS), size=n)
    logits = rng.normal(0, 1.5, (n, 1)) + rng.normal(0, 1.0, (n, len(MODELS))) + np.array([-0.6, 0.0, 0.6])
    correct = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    cost = USD * rng.lognormal(0, 0.3, (n, 1))
    cost_norm = np.clip(cost / cost.max(), 0, 1)

    def sees(noise: float, generator: np.random.Generator) -> RouterPredictions:
        seen = logits + generator.normal(0, noise, logits.shape)
        return RouterPredictions(1 / (1 + np.exp(-seen / (1 + noise**2 / 3) ** 0.5)), 0.0)

    names = np.array([BENCHMARKS[b] for b in benchmark], dtype=object)
    names[:rare] = [f"rare {at // 10}" for at in range(rare)]
    ids = np.array([f"q{at:05d}" for at in range(n)], dtype=object)
    return Predictions(
        ids,
        names,
        ids,
        MODELS,
        correct,
        cost,
        cost_norm,
        {CHAMPION: sees(champion, rng), CANDIDATE: sees(candidate, np.random.default_rng([draw, seed]))},
        TrainingMeans(correct.mean(axis=0), cost_norm.mean(axis=0)),
    )
