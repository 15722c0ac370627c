"""Queries whose labels contradict the abilities of the models: their reference answer may be wrong.

In: `LabelTable`. Out: a `Finding`. In each benchmark a Rasch model (Rasch 1960) is fitted:

    P(model m answers query q correctly) = sigmoid(ability[m] - difficulty[q])

The score of a query is a log-likelihood ratio, in nats: how much better its labels are explained by one probability for
all models, the share of right labels, than by the abilities. It is high if strong models are wrong and weak ones are
right, as with a negative discrimination in a two-parameter model, a known sign of a wrong reference answer (Rodriguez
et al. 2021, Evaluation Examples Are Not Equally Informative). A query is suspicious if its score exceeds every score of
SIMULATIONS tables drawn from the fitted model: of tables whose labels follow the model, one in SIMULATIONS + 1 has such
a query. Real models have strengths that one ability does not describe, so a suspicion is no proof.

A query that no model answers correctly has no such score. It is suspicious in a benchmark that is easy for the models.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import expit, xlogy

from prefill_router.outcomes.quality.findings import MIN_QUERIES, Finding, Share, Table, suspects
from prefill_router.outcomes.quality.table import LabelTable

PRIOR_ABILITY, PRIOR_DIFFICULTY = 3.0, 2.0  # standard deviations of the normal priors, in logits
ROUNDS, STEPS, LARGEST_STEP = 40, 12, 2.0  # Newton steps: of abilities and difficulties, and of difficulties alone
MIN_MODELS = 4  # with a label; with fewer the score has nearly no power
SIMULATIONS, SEED = 20, 0
EASY = 0.7  # mean accuracy of the models in the benchmark
SHOWN = 5  # models that a detail names


def implausible(labels: LabelTable) -> Finding:
    """Queries on which strong models are wrong and weak ones right, or on which all models are wrong."""
    correct = labels.outcomes.correct
    checked = np.isfinite(correct).sum(axis=1) >= MIN_MODELS
    if not checked.any():
        return Finding("implausible", "queries", None, f"queries with labels of at least {MIN_MODELS} models")
    score, ability, threshold = scores(labels)
    mean = _accuracies(labels)
    misfit, no_right = score > threshold, checked & ~(correct == 1).any(axis=1)
    all_wrong = no_right & (mean >= EASY)
    queries = np.concatenate([_ranked(misfit, score), _ranked(all_wrong, mean)])
    by_benchmark = {
        name: Share(int(((misfit | all_wrong) & part).sum()), int((checked & part).sum()))
        for number, name in enumerate(labels.benchmarks)
        if ((misfit | all_wrong) & (part := labels.of_benchmark == number)).any()
    }
    return Finding(
        "implausible",
        "queries",
        Share(len(queries), int(checked.sum())),
        by_benchmark=by_benchmark,
        tables=(_all_wrong(labels, no_right, checked),) if no_right.any() else (),
        figures={
            "strong_wrong_weak_right": int(misfit.sum()),
            "all_wrong_in_an_easy_benchmark": int(all_wrong.sum()),
            "all_wrong": int(no_right.sum()),
            "threshold": threshold,
        },
        suspects=suspects(
            labels,
            "implausible",
            queries,
            score=np.where(misfit[queries], score[queries], np.nan),
            detail=[_detail(labels, int(query), ability[query], float(mean[query])) for query in queries],
        ),
    )


def scores(labels: LabelTable) -> tuple[Float[np.ndarray, " queries"], Float[np.ndarray, "queries models"], float]:
    """The score of each query, the abilities in its benchmark, and the highest score of the simulated tables.

    The score is NaN with fewer than MIN_MODELS labels, or with equal labels. Benchmarks with fewer than MIN_QUERIES
    queries are fitted together.
    """
    correct = labels.outcomes.correct.astype(np.float64)
    score, abilities = np.full(len(correct), np.nan), np.full(correct.shape, np.nan)
    sizes = np.bincount(labels.of_benchmark)
    part_of = np.where(sizes[labels.of_benchmark] >= MIN_QUERIES, labels.of_benchmark, -1)
    rng, highest = np.random.default_rng(SEED), 0.0
    for part in np.unique(part_of):
        rows = np.flatnonzero(part_of == part)
        ability, difficulty = fit_rasch(correct[rows])
        score[rows], abilities[rows] = misfits(correct[rows], ability), ability
        p = expit(ability - difficulty[:, None])
        for _ in range(SIMULATIONS):
            drawn = np.where(np.isnan(correct[rows]), np.nan, (rng.random(p.shape) < p).astype(np.float64))
            highest = max(highest, float(np.nanmax(misfits(drawn, ability), initial=0.0)))
    return score, abilities, highest


def fit_rasch(
    correct: Float[np.ndarray, "queries models"],
) -> tuple[Float[np.ndarray, " models"], Float[np.ndarray, " queries"]]:
    """Abilities and difficulties in logits, the joint maximum of the posterior; NaN is unlabelled.

    The normal priors with mean 0 keep the difficulty of a query with equal labels finite.
    """
    known = np.isfinite(correct)
    right = np.where(known, correct, 0.0)
    ability, difficulty = np.zeros(correct.shape[1]), np.zeros(len(correct))
    for _ in range(ROUNDS):
        difficulty = _difficulty_step(right, known, ability, difficulty)
        p = expit(ability - difficulty[:, None]) * known
        slope = (right - p).sum(axis=0) - ability / PRIOR_ABILITY**2
        curvature = (p * (1 - p)).sum(axis=0) + PRIOR_ABILITY**-2
        ability = ability + np.clip(slope / curvature, -LARGEST_STEP, LARGEST_STEP)
    return ability, difficulty


def misfits(
    correct: Float[np.ndarray, "queries models"], ability: Float[np.ndarray, " models"]
) -> Float[np.ndarray, " queries"]:
    """The score of each query at the best difficulty; NaN with fewer than MIN_MODELS labels or with equal labels."""
    known = np.isfinite(correct)
    right = np.where(known, correct, 0.0)
    difficulty = np.zeros(len(correct))
    for _ in range(STEPS):
        difficulty = _difficulty_step(right, known, ability, difficulty)
    logit = (ability - difficulty[:, None]) * known
    by_ability = (right * logit - np.logaddexp(0, logit) * known).sum(axis=1)
    n, count = known.sum(axis=1), right.sum(axis=1)
    share = count / np.maximum(n, 1)
    by_share = xlogy(count, share) + xlogy(n - count, 1 - share)
    mixed = (count > 0) & (count < n) & (n >= MIN_MODELS)
    return np.where(mixed, by_share - by_ability, np.nan)


def _difficulty_step(right: np.ndarray, known: np.ndarray, ability: np.ndarray, difficulty: np.ndarray) -> np.ndarray:
    """One Newton step of the difficulties."""
    p = expit(ability - difficulty[:, None]) * known
    slope = (p - right).sum(axis=1) - difficulty / PRIOR_DIFFICULTY**2
    curvature = (p * (1 - p)).sum(axis=1) + PRIOR_DIFFICULTY**-2
    return np.asarray(difficulty + np.clip(slope / curvature, -LARGEST_STEP, LARGEST_STEP))


def _accuracies(labels: LabelTable) -> Float[np.ndarray, " queries"]:
    """The mean label in the benchmark of each query; NaN without labels."""
    correct, place = labels.outcomes.correct, labels.of_benchmark
    right, n = (np.bincount(place, flags.sum(axis=1)) for flags in (correct == 1, np.isfinite(correct)))
    return np.divide(right, n, out=np.full(len(n), np.nan), where=n > 0)[place]


def _ranked(flags: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The positions of the flagged queries, those with the highest value first."""
    places = np.flatnonzero(flags)
    return np.asarray(places[np.argsort(-by[places], kind="stable")])


def _detail(labels: LabelTable, query: int, ability: np.ndarray, mean: float) -> str:
    row = labels.outcomes.correct[query]
    strongest = [model for model in np.argsort(-ability, kind="stable") if np.isfinite(row[model])]
    wrong = [labels.models[model] for model in strongest if row[model] == 0]
    right = [labels.models[model] for model in reversed(strongest) if row[model] == 1]
    if not right:
        return f"all {len(wrong)} models are wrong; mean accuracy in the benchmark {mean:.2f}"
    return f"wrong, strongest first: {_listed(wrong)}; right, weakest first: {_listed(right)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _all_wrong(labels: LabelTable, no_right: np.ndarray, checked: np.ndarray) -> Table:
    rows = []
    for number, name in enumerate(labels.benchmarks):
        part = labels.of_benchmark == number
        share = Share(int((no_right & part).sum()), int((checked & part).sum()))
        correct = labels.outcomes.correct[part]
        if share.count:
            rows.append((name, share, Share(int((correct == 1).sum()), int(np.isfinite(correct).sum()))))
    rows.sort(key=lambda row: -(row[2].estimate or 0.0))
    columns = ("benchmark", "queries", "accuracy of all models")
    return Table("Queries that no model answers correctly", columns, tuple(rows))
