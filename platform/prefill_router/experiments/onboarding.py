"""The evidence for the head of a new model: held-out figures, the rule that lets it decide, and labels needed.

In: the labelled queries of a new model (`onboarding.Material`), their groups and folds. Out: figures with intervals,
whether the head may decide, and a curve of the held-out Brier score over the number of labels.

The held-out figures are those of the complete procedure: each fold is predicted by a head whose candidate and spread
were chosen without it. The curve is measured on subsamples and extrapolated by Brier(n) = a + b / n, the excess of a
well specified parametric model (docs/equations.md, Onboarding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from prefill_router.metrics.bootstrap import Interval, interval, resample
from prefill_router.metrics.confidences import brier_per_model, roc_auc_per_model
from prefill_router.routing.added import AddedHead
from prefill_router.routing.onboarding import CANDIDATES, Candidate, Material, fit_head

Progress = Callable[[Sequence[Any]], Iterable[Any]]
RESAMPLES = 1000
SHARES = (0.1, 0.2, 0.4, 0.8)  # of the labels, in the subsamples of the curve
FEWEST = 8  # labels of a subsample
FURTHEST = 100_000  # labels up to which the number needed is searched
Z = 1.96


@dataclass(frozen=True)
class Rule:
    """When a head may decide: enough labels, and a held-out Brier score measurably below that of the constant rate.

    `labels`: fewest labelled queries. `of_each`: fewest right and fewest wrong answers among them.
    """

    labels: int = 50
    of_each: int = 5


@dataclass(frozen=True)
class HeldOut:
    """Held-out predictions of the head and of the constant rate, and their figures with 95 % bootstrap intervals.

    `gain`: Brier score of the constant rate minus that of the head, paired.
    """

    p: Float[np.ndarray, " queries"]
    rate: Float[np.ndarray, " queries"]
    auc: Interval
    brier: Interval
    brier_constant: Interval
    gain: Interval

    @property
    def figures(self) -> dict[str, Any]:
        """The figures as JSON."""
        names = ("auc", "brier", "brier_constant", "gain")
        return {name: getattr(self, name).to_json() for name in names}


@dataclass(frozen=True)
class Point:
    """A size of the curve: figures of each draw on the labelled queries that the head did not see, and their number."""

    labels: int
    brier: Float[np.ndarray, " draws"]
    brier_constant: Float[np.ndarray, " draws"]
    auc: Float[np.ndarray, " draws"]
    held_out: int


@dataclass(frozen=True)
class Curve:
    """Held-out figures over the number of labels.

    Brier(n) is about `level` + `excess` / n. `labels_needed` is the least number of labels at which the rule lets the
    head decide, by the fitted form; None if it never does.
    """

    points: tuple[Point, ...]
    level: Interval
    excess: Interval
    labels_needed: int | None

    def brier(self, labels: Float[np.ndarray, " sizes"]) -> Float[np.ndarray, " sizes"]:
        """The fitted form."""
        return np.asarray((self.level.estimate or 0.0) + (self.excess.estimate or 0.0) / labels)


def held_out(
    material: Material,
    correct: Float[np.ndarray, " queries"],
    groups: np.ndarray,
    folds: Int[np.ndarray, " queries"],
    candidates: Sequence[Candidate] = CANDIDATES,
    bags: int = 0,
    seed: int = 0,
) -> HeldOut:
    """Predicts each fold by a head that was fitted without it. `correct` are labels 0 or 1."""
    p, rate = np.empty(len(correct)), np.empty(len(correct))
    for fold in np.unique(folds):
        rest, own = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        p[own] = fit_head(material.take(rest), candidates, bags, seed).head(material.inputs.take(own))[0]
        rate[own] = smoothed_rate(correct[rest])
    return assess(p, rate, correct, groups, seed)


def assess(
    p: Float[np.ndarray, " queries"],
    rate: Float[np.ndarray, " queries"],
    correct: Float[np.ndarray, " queries"],
    groups: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> HeldOut:
    """Figures of held-out predictions, by a bootstrap over groups."""

    def figures(weights: Float[np.ndarray, "resamples queries"]) -> dict[str, np.ndarray]:
        brier = brier_per_model(np.column_stack([p, rate]), np.column_stack([correct, correct]), weights)
        auc = roc_auc_per_model(p[:, None], correct[:, None], weights)[:, 0]
        return {"auc": auc, "brier": brier[:, 0], "brier_constant": brier[:, 1], "gain": brier[:, 1] - brier[:, 0]}

    found = resample(figures, groups, resamples, seed)
    return HeldOut(p, rate, **{name: interval(values, "one class only") for name, values in found.items()})


def smoothed_rate(correct: Float[np.ndarray, " queries"]) -> float:
    """The rate of right answers, with one more of each class (Laplace)."""
    return float((correct.sum() + 1) / (len(correct) + 2))


def missing_evidence(rule: Rule, correct: Float[np.ndarray, " queries"], found: HeldOut) -> str | None:
    """Why the head may not decide; None if it may."""
    least = min(int((correct == 1).sum()), int((correct == 0).sum()))
    if len(correct) < rule.labels:
        return f"{len(correct):,} labels, at least {rule.labels:,} are needed"
    if least < rule.of_each:
        return f"{least} labels of one class, at least {rule.of_each} are needed"
    if found.gain.lower is None or found.gain.lower <= 0:
        return "the held-out Brier score is not measurably below that of the constant rate"
    return None


def labels_curve(
    material: Material,
    correct: Float[np.ndarray, " queries"],
    groups: np.ndarray,
    found: HeldOut,
    rule: Rule,
    draws: int,
    candidates: Sequence[Candidate] = CANDIDATES,
    bags: int = 0,
    seed: int = 0,
    progress: Progress = iter,
) -> Curve | None:
    """The curve over subsamples of the labelled queries; None if they are too few. `found`: figures of all labels.

    Heads are fitted as in `held_out`, with `candidates`, `bags` and `seed`.
    """
    sizes = sorted({int(share * len(correct)) for share in SHARES if share * len(correct) >= FEWEST})
    if len(sizes) < 2:
        return None
    rng = np.random.default_rng(seed)
    orders = [_by_group(groups, rng) for _ in range(draws)]

    def fit(part: Material) -> AddedHead:
        return fit_head(part, candidates, bags, seed).head

    points = tuple(_point(material, correct, groups, orders, size, fit) for size in progress(sizes))
    fits = np.array(
        [_form(points, np.arange(draws)), *(_form(points, rng.integers(draws, size=draws)) for _ in range(200))]
    )
    rate = float(correct.mean())
    spread = float(np.std(np.square(found.rate - correct) - np.square(found.p - correct)))
    needed = _labels_needed(rate, (float(fits[0, 0]), float(fits[0, 1])), spread, rule)
    return Curve(points, interval(fits[:, 0]), interval(fits[:, 1]), needed)


def _point(
    material: Material,
    correct: np.ndarray,
    groups: np.ndarray,
    orders: Sequence[np.ndarray],
    size: int,
    fit: Callable[[Material], AddedHead],
) -> Point:
    rows = []
    for order in orders:
        seen = order[:size]
        rest = order[size:][~np.isin(groups[order[size:]], groups[seen])]
        p = fit(material.take(seen))(material.inputs.take(rest))[0]
        rate, y = smoothed_rate(correct[seen]), correct[rest]
        auc = roc_auc_per_model(p[:, None], y[:, None], np.ones((1, len(y))))[0, 0]
        rows.append((np.square(p - y).mean(), np.square(rate - y).mean(), auc, len(rest)))
    brier, constant, auc, count = np.array(rows).T
    return Point(size, brier, constant, auc, int(count.mean()))


def _by_group(groups: np.ndarray, rng: np.random.Generator) -> Int[np.ndarray, " queries"]:
    """A random order of the queries in which each group is contiguous."""
    names, of_query = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.asarray(np.argsort(rng.permutation(len(names))[of_query], kind="stable"))


def _form(points: Sequence[Point], draws: np.ndarray) -> tuple[float, float]:
    """Least squares of Brier(n) = level + excess / n with excess >= 0; a draw weighs as its held-out queries."""
    x = np.repeat([1 / point.labels for point in points], len(draws))
    y = np.concatenate([point.brier[draws] for point in points])
    weight = np.repeat([float(point.held_out) for point in points], len(draws))
    centre, level = np.average(x, weights=weight), np.average(y, weights=weight)
    excess = max(float(weight @ ((x - centre) * (y - level)) / (weight @ np.square(x - centre))), 0.0)
    return float(level - excess * centre), excess


def _labels_needed(rate: float, form: tuple[float, float], spread: float, rule: Rule) -> int | None:
    """The least n with a lower bound of the gain above 0: rate (1 - rate) - Brier(n) > Z spread / sqrt(n)."""
    n = np.arange(rule.labels, FURTHEST + 1)
    enough = rate * (1 - rate) - form[0] - form[1] / n > Z * spread / np.sqrt(n)
    return int(n[enough.argmax()]) if enough.any() else None
