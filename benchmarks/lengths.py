"""The length head against the training median: errors of the output length, and decisions with either estimate.

Fits the default router at several split seeds. On the test queries of each seed, for every target: the errors of the
output tokens. For the pool: decisions of the same confidences with costs from the medians, from the length model, and
from the recorded lengths (an oracle), all judged by the cost of the recorded lengths. All figures are means over seeds
with the corrected resampled t interval of `metrics.seeds`.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from jaxtyping import Float
from pydantic import Field
from threadpoolctl import threadpool_limits

from prefill_router.cli import main
from prefill_router.files import write_atomically, write_json
from prefill_router.metrics import seeds
from prefill_router.metrics.bootstrap import Json
from prefill_router.outcomes.splits import Scheme, make_folds
from prefill_router.pool import Pool
from prefill_router.routing import policy
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import calibration_queries, fit_router
from prefill_router.routing.layers import N_FOLDS
from prefill_router.routing.lengths import LengthModel, fit_lengths, without_regret
from prefill_router.signals.join import Signals
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals

Headings = dict[tuple[str, ...], str]
LAMBDAS = (0.05, 0.1, 0.2, 0.4, 0.7)
SHARES = (0.25, 0.5, 0.75, 0.9)  # of the way from the accuracy at lambda 1 to the highest accuracy of the sweep
ERRORS: Headings = {
    ("log_error_median",): "RMSE of log(1 + tokens), median",
    ("log_error_head",): "head",
    ("error_median",): "RMSE in tokens, median",
    ("error_head",): "head",
    ("absolute_median",): "mean absolute error in tokens, median",
    ("absolute_head",): "head",
    ("uses_head",): "share of seeds that use the head",
}
DECISIONS: Headings = {
    ("utility",): "utility x 1,000, length model - median",
    ("oracle",): "recorded lengths - median",
    ("accuracy",): "accuracy, length model - median",
    ("cost",): "spend, length model / median - 1",
}
SPEND: Headings = {
    ("spend",): "spend at equal accuracy, length model / median - 1",
    ("oracle",): "recorded lengths / median - 1",
}


class LengthsConfig(SignalsConfig):
    """Inputs, and the split seeds."""

    seeds: Annotated[int, Field(ge=2, description="split seeds, from 0")] = 3
    scheme: Annotated[Scheme, Field(description="split scheme; 75/10/15 needs one fit, 85/15 six")] = "75/10/15"


def run(config: LengthsConfig) -> str:
    """Fit the router and its length head at several split seeds; write errors and decisions on the test split."""
    threadpool_limits(1)
    pool, signals = load_signals(config)
    by_seed = [_one_seed(pool, signals, seed, config.scheme) for seed in range(config.seeds)]
    tables = {}
    for part, headings in (("targets", ERRORS), ("lambdas", DECISIONS), ("shares", SPEND)):
        summary = seeds.across_seeds({seed: {"pool": {}, "routers": one[part]} for seed, one in enumerate(by_seed)})
        tables[part] = (summary, seeds.markdown(summary, headings))
    text = "\n".join(table for _, table in tables.values())
    write_json(
        config.output / "lengths.json",
        {"config": config.model_dump(mode="json"), **{part: summary for part, (summary, _) in tables.items()}},
    )
    write_atomically(config.output / "lengths.md", lambda place: place.write_text(text, encoding="utf-8"))
    print(f"\n{text}")
    return f"{len(pool.models)} targets x {config.seeds} seeds; tables in {config.output / 'lengths.md'}"


def _one_seed(pool: Pool, signals: Signals, seed: int, scheme: Scheme) -> dict[str, Json]:
    outcomes, split = signals.outcomes, split_signals(signals, seed, scheme)
    fitted = fit_router(signals, pool, split, FitConfig(seed=seed, scheme=scheme), {})
    router, folds = fitted.router, make_folds(outcomes, split.train, seed, N_FOLDS)
    features, n_tokens = router.features(signals.states), signals.n_tokens[router.counting_encoder]
    rows, _ = calibration_queries(outcomes, split, folds, seed)
    lengths, out_of_fold = fit_lengths(features, outcomes.output_tokens, split.train, folds)
    lengths = without_regret(
        lengths,
        out_of_fold if np.array_equal(rows, split.train) else lengths.head(features[rows]),
        outcomes.output_tokens[rows],
        fitted.held_out_p[rows],
        outcomes.correct[rows],
        router.costs,
        router.costs.input_tokens(n_tokens[rows], outcomes.input_tokens[rows], outcomes.prompt_bytes[rows]),
    )
    test = split.test
    targets = _errors(pool, lengths, features[test], outcomes.output_tokens[test])
    complete = test[outcomes.complete[test] & ~np.isnan(outcomes.output_tokens[test]).any(axis=1)]
    input_tokens = router.costs.input_tokens(
        n_tokens[complete], outcomes.input_tokens[complete], outcomes.prompt_bytes[complete]
    )
    p, correct = router.confidences(features[complete])[0], outcomes.correct[complete].astype(np.float64)
    tokens = outcomes.output_tokens[complete].astype(np.float64)
    true = router.costs.of_tokens(input_tokens, tokens)
    norm = router.costs.normalise(true, extrapolate=True)
    curves = {}
    for name, expected in (
        ("median", np.broadcast_to(lengths.median, tokens.shape)),
        ("lengths", lengths(features[complete])),
        ("oracle", tokens),
    ):
        cost = router.costs.of_tokens(input_tokens, expected)
        choices = [
            policy.choose(p, cost, router.costs.normalise(cost, extrapolate=True), lam) for lam in policy.LAMBDAS
        ]
        at = np.arange(len(complete))
        curves[name] = np.array(
            [
                (
                    correct[at, chosen].mean(),
                    true[at, chosen].mean(),
                    policy.utility(correct, norm, chosen, lam).mean(),
                )
                for lam, chosen in zip(policy.LAMBDAS, choices, strict=True)
            ]
        )
    return {"targets": targets, "lambdas": _decisions(curves), "shares": _spend(curves)}


def _errors(
    pool: Pool,
    lengths: LengthModel,
    features: Float[np.ndarray, "queries features"],
    tokens: Float[np.ndarray, "queries models"],
) -> Json:
    """Errors of both estimates for every target, and their means over targets. Errors of the log are not smeared."""
    estimates = {
        "median": (np.log1p(lengths.median), lengths.median),
        "head": (features @ lengths.weights + lengths.offset, lengths.head(features)),
    }
    values = {"uses_head": lengths.uses_head.astype(np.float64)}
    for name, (log, estimate) in estimates.items():
        values |= {
            f"log_error_{name}": np.sqrt(np.nanmean(np.square(log - np.log1p(tokens)), axis=0)),
            f"error_{name}": np.sqrt(np.nanmean(np.square(estimate - tokens), axis=0)),
            f"absolute_{name}": np.nanmean(np.abs(estimate - tokens), axis=0),
        }
    rows = {model: {name: _figure(value[at]) for name, value in values.items()} for at, model in enumerate(pool.names)}
    return {**rows, "mean over targets": {name: _figure(value.mean()) for name, value in values.items()}}


def _decisions(curves: dict[str, np.ndarray]) -> Json:
    rows = {}
    for lam in LAMBDAS:
        at = int(np.abs(policy.LAMBDAS - lam).argmin())
        median, own, oracle = (curves[name][at] for name in ("median", "lengths", "oracle"))
        rows[f"lambda {lam}"] = {
            "utility": _figure(1000 * (own[2] - median[2])),
            "oracle": _figure(1000 * (oracle[2] - median[2])),
            "accuracy": _figure(own[0] - median[0]),
            "cost": _figure(own[1] / median[1] - 1),
        }
    return rows


def _spend(curves: dict[str, np.ndarray]) -> Json:
    """Cost of the same accuracy, from points of the sweep that no cheaper point reaches, linear in between."""
    low = max(curve[-1, 0] for curve in curves.values())
    high = min(curve[:, 0].max() for curve in curves.values())
    rows = {}
    for share in SHARES:
        spend = {name: _cost_of(curve, low + share * (high - low)) for name, curve in curves.items()}
        rows[f"accuracy {share:.0%} of the way up"] = {
            "spend": _figure(spend["lengths"] / spend["median"] - 1),
            "oracle": _figure(spend["oracle"] / spend["median"] - 1),
        }
    return rows


def _cost_of(curve: np.ndarray, accuracy: float) -> float:
    ordered = curve[np.lexsort((-curve[:, 0], curve[:, 1]))]
    front = ordered[ordered[:, 0] > np.concatenate([[-1.0], np.maximum.accumulate(ordered[:-1, 0])])]
    return float(np.interp(accuracy, front[:, 0], front[:, 1]))


def _figure(value: float) -> Json:
    return {"estimate": float(value), "lower": None, "upper": None}


if __name__ == "__main__":
    main(LengthsConfig, run)
