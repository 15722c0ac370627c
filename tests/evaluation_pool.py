"""A synthetic test split: up to nine models, six benchmarks, groups, missing labels."""

from __future__ import annotations

import numpy as np

from prefill_router.metrics.predictions import Predictions, RouterPredictions
from prefill_router.routing.policy import TrainingMeans

MODELS = (
    "tiny-1b",
    "small-4b",
    "coder-7b",
    "medium-12b",
    "math-14b",
    "large-70b",
    "frontier-mini",
    "frontier",
    "frontier-reasoning",
)
BENCHMARKS = ("algebra", "biology", "code reading", "economics", "history", "logic")
PRICE = np.array([0.00002, 0.00006, 0.0001, 0.00018, 0.00025, 0.0008, 0.0012, 0.006, 0.021])
SKILL = np.array([-0.9, -0.2, -0.3, 0.2, 0.25, 0.6, 0.9, 1.3, 1.45])


def made_up(
    n_queries: int = 400, n_models: int = 6, seed: int = 0, missing: float = 0.01, group_size: int = 1
) -> Predictions:
    """Queries of known difficulty; routers that see it with different noise, and one that knows only the benchmark."""
    rng = np.random.default_rng(seed)
    which = np.linspace(0, len(MODELS) - 1, n_models).round().astype(int)
    benchmark = rng.integers(len(BENCHMARKS), size=n_queries)
    taste = rng.normal(0, 0.6, (len(BENCHMARKS), n_models))
    logit = (
        SKILL[which] * 1.3
        + taste[benchmark]
        + rng.normal(0, 1.2, (n_queries, 1))
        + rng.normal(0, 0.8, (n_queries, n_models))
    )
    truth = 1 / (1 + np.exp(-logit))
    correct = (rng.random(truth.shape) < truth).astype(float)
    cost = PRICE[which] * rng.lognormal(0, 0.4, (n_queries, 1))
    cost_norm = np.clip((cost - cost.min()) / (cost.max() - cost.min()), 0, 1)
    training = TrainingMeans(truth.mean(axis=0), cost_norm.mean(axis=0))
    prior = np.empty_like(correct)
    for b in set(benchmark):
        prior[benchmark == b] = correct[benchmark == b].mean(axis=0)
    correct[rng.random(correct.shape) < missing] = np.nan

    def sees(noise: float) -> np.ndarray:
        return 1 / (1 + np.exp(-0.8 * (logit + rng.normal(0, noise, logit.shape))))

    routers = {
        "prefill": (sees(0.8), 0.06),
        "unified-mlp": (sees(1.4), 0.05),
        "knn": (np.round(sees(2.2), 1), 0.08),
        "category-prior": (prior, 0.11),
    }
    return Predictions(
        np.array([f"q{i:05d}" for i in range(n_queries)], dtype=object),
        np.array([BENCHMARKS[b] for b in benchmark], dtype=object),
        np.array([f"g{i // group_size}" for i in range(n_queries)], dtype=object),
        tuple(MODELS[i] for i in which),
        correct,
        cost,
        cost_norm,
        {name: RouterPredictions(p, lam) for name, (p, lam) in routers.items()},
        training,
    )
