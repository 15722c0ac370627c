"""Bias, error and coverage of off-policy estimates on simulated logs of known truth.

The queries of an outcomes table have the answers of every model, so that the value of every policy is known. A router
is fitted; its held-out confidences of the training queries are those of the live checkpoint, and those without stack
are the canary's. Models that no policy chooses are left out. A log draws queries with replacement, a model by the
logging policy, and feedback at a rate that rises with the accuracy of the model. For every logging policy, log size and
target policy: bias, root mean square error and coverage of the 95 % intervals over many logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from scipy.special import expit, logit
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from prefill_router.cli import main
from prefill_router.decisions.off_policy import (
    MIN_MATCHED,
    Estimate,
    Logged,
    bounds,
    empirical_bernstein,
    estimates,
    weigh,
)
from prefill_router.decisions.outcome_model import recalibrated, rescaled
from prefill_router.files import read_json, sha256_strings, write_atomically, write_json
from prefill_router.reports.format import DASH
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import finish_router, train_trunks
from prefill_router.routing.policy import choose
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals

LAMBDAS = (0.0, 0.1, 0.2, 0.4, 1.0)
LIVE = 0.1  # lambda of both arms of the canary
RATES = (0.15, 0.35)  # of feedback, from the least to the most accurate model
EXPLORED = 0.1  # share of decisions with a random model
BLOCK = 50  # logs that are simulated and kept at once
CAP = 20.0  # bound on the ratio of probabilities of the capped DR
MODELS = ("calibrated", "miscalibrated", "recalibrated")  # outcome models
Draw = list[float | None]  # estimate, lower, upper
Draws = dict[str, dict[str, dict[str, list[Draw]]]]
SHOWN = ("matched", "ips", "snips", *(f"{kind}, {model}" for model in MODELS for kind in ("dm", "dr")), "dr, capped")


class OffPolicyConfig(SignalsConfig):
    """Inputs, sizes and number of the logs."""

    sizes: Annotated[
        dict[int, Annotated[int, Field(ge=20)]], Field(description="simulated logs by their number of decisions")
    ] = {500: 500, 2000: 500, 8000: 100}
    seed: Annotated[int, Field(ge=0, description="seed of the logs")] = 0
    fit: FitConfig = FitConfig()


@dataclass(frozen=True)
class Population:
    """Queries with the answers of every model: [queries, models]; costs in USD."""

    correct: np.ndarray
    spend: np.ndarray
    estimated: np.ndarray
    estimated_norm: np.ndarray
    live: np.ndarray
    canary: np.ndarray

    def choices(self, p: np.ndarray, lam: float) -> np.ndarray:
        """The choices at lambda as probabilities."""
        return np.eye(p.shape[1])[choose(p, self.estimated, self.estimated_norm, lam)]

    def logging(self) -> dict[str, np.ndarray]:
        """The logging policies."""
        live = self.choices(self.live, LIVE)
        return {
            "canary": 0.8 * live + 0.2 * self.choices(self.canary, LIVE),
            "three lambdas": 0.5 * self.choices(self.live, 0.05)
            + 0.3 * self.choices(self.live, 0.2)
            + 0.2 * self.choices(self.live, 0.4),
            "exploration": (1 - EXPLORED) * live + EXPLORED / live.shape[1],
        }

    def targets(self) -> dict[str, np.ndarray]:
        """The target policies."""
        best = np.zeros(self.live.shape)
        best[:, self.correct.mean(axis=0).argmax()] = 1.0
        found = {f"lambda {lam:g}": self.choices(self.live, lam) for lam in LAMBDAS}
        return found | {"canary": self.choices(self.canary, LIVE), "best single": best}


def run(config: OffPolicyConfig) -> str:
    """Simulate logs, estimate the value of target policies, and compare with the truth."""
    threadpool_limits(1)
    population = _population(config)
    rows: list[dict[str, Any]] = []
    for design in population.logging():
        for size, logs in config.sizes.items():
            rows += _rows(config, population, design, size, logs)
    write_json(config.output / "off_policy.json", {"config": config.model_dump(mode="json"), "rows": rows})
    text = "\n\n".join(_table(rows, outcome) for outcome in ("score", "cost_usd"))
    write_atomically(config.output / "off_policy.md", lambda path: path.write_text(text, encoding="utf-8"))
    print(text)
    return f"{len(rows)} settings; tables in {config.output / 'off_policy.md'}"


def _population(config: OffPolicyConfig) -> Population:
    """The training queries with held-out confidences; kept for further runs."""
    path = Path(config.output) / "population.npz"
    if not path.exists():
        pool, signals = load_signals(config)
        split = split_signals(signals, config.fit.seed, config.fit.scheme)
        trained = train_trunks(signals, pool, split, config.fit, progress=True)
        fitted = finish_router(trained, config.fit, {})
        plain = finish_router(trained, config.fit.model_copy(update={"stack": ()}), {})
        router, outcomes = fitted.router, signals.outcomes
        rows = split.train[outcomes.complete[split.train]]
        lengths = router.output_tokens(router.features(signals.states))
        estimated = router.costs.estimate(
            signals.n_tokens[router.counting_encoder], outcomes.input_tokens, outcomes.prompt_bytes, lengths
        )
        spend = router.costs.of_tokens(
            outcomes.input_tokens.astype(np.float64), outcomes.output_tokens.astype(np.float64)
        )
        arrays = {
            "correct": outcomes.correct.astype(np.float64),
            "spend": np.where(np.isnan(spend), estimated, spend),
            "estimated": estimated,
            "estimated_norm": router.costs.normalise(estimated, extrapolate=True),
            "live": fitted.held_out_p,
            "canary": plain.held_out_p,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{name: values[rows] for name, values in arrays.items()})
    with np.load(path) as arrays:
        everything = Population(**arrays)
    policies = [everything.logging()["canary"], everything.logging()["three lambdas"], *everything.targets().values()]
    used = np.sum(policies, axis=(0, 1)) > 0
    return Population(*(values[:, used] for values in vars(everything).values()))


def _cached(config: OffPolicyConfig, population: Population, design: str, size: int, first: int) -> Draws:
    """The estimates on BLOCK logs from number `first` on; kept for interrupted runs."""
    settings = (config.seed, RATES, MODELS, LAMBDAS, LIVE, EXPLORED, CAP, MIN_MATCHED, population.correct.tobytes())
    key = sha256_strings([repr(settings)])[:8]
    path = Path(config.output) / key / f"{design.replace(' ', '-')}-{size}-{first}.json"
    if not path.exists():
        write_json(path, _simulate(config, population, design, size, range(first, first + BLOCK)))
    found: Draws = read_json(path)
    return found


def _simulate(config: OffPolicyConfig, population: Population, design: str, size: int, logs: range) -> Draws:
    """By target policy, outcome and estimator: [estimate, lower, upper] of every log."""
    policy, targets = population.logging()[design], population.targets()
    order = np.argsort(np.argsort(population.correct.mean(axis=0)))
    rates = RATES[0] + (RATES[1] - RATES[0]) * order / (len(order) - 1)
    found: Draws = {}
    for log in tqdm(logs, desc=f"{design}, {size:,} decisions", unit=" logs", mininterval=5):
        random = np.random.default_rng((config.seed, size, log))
        rows = random.integers(len(policy), size=size)
        chosen = (random.random((size, 1)) < policy[rows].cumsum(axis=1)).argmax(axis=1)
        logged = Logged(chosen, policy[rows], np.arange(size))
        answered = random.random(size) < rates[chosen]
        right = np.where(answered, logged.of_chosen(population.correct[rows]), np.nan)
        spend = logged.of_chosen(population.spend[rows])
        calibrated = population.live[rows]
        wrong = expit(2 * logit(np.clip(calibrated, 1e-6, 1 - 1e-6)) + 1)  # overconfident, and too high
        models = dict(zip(MODELS, (calibrated, wrong, recalibrated(logged, wrong, right)), strict=True))
        cost_model = rescaled(logged, population.estimated[rows], spend)
        for name, whole in targets.items():
            own = found.setdefault(name, {"score": {}, "cost_usd": {}})
            _add(own["score"], logged, whole[rows], right, models, agreement=True)
            _add(own["cost_usd"], logged, whole[rows], spend, {"calibrated": cost_model}, agreement=False)
    return found


def _rows(
    config: OffPolicyConfig, population: Population, design: str, size: int, logs: int
) -> Iterator[dict[str, Any]]:
    """The figures of every target policy and outcome, over all logs of one logging policy and size."""
    policy, targets = population.logging()[design], population.targets()
    blocks = [_cached(config, population, design, size, first) for first in range(0, logs, BLOCK)]
    for name, target in targets.items():
        for outcome, actual in (("score", population.correct), ("cost_usd", population.spend)):
            truth = float((target * actual).sum(axis=1).mean())
            draws = {
                estimator: [one for block in blocks for one in block[name][outcome][estimator]][:logs]
                for estimator in blocks[0][name][outcome]
            }
            yield {
                "logging": design,
                "decisions": size,
                "logs": logs,
                "target": name,
                "outcome": outcome,
                "truth": truth,
                "supported": float(np.where(policy > 0, target, 0.0).sum(axis=1).mean()),
                "ess": float(np.mean([one[0] for one in draws.pop("ess") if one[0] is not None])),
                "estimators": {estimator: _figures(own, truth) for estimator, own in draws.items()},
            }


def _add(
    draws: dict[str, list[Draw]],
    logged: Logged,
    target: np.ndarray,
    outcome: np.ndarray,
    models: dict[str, np.ndarray],
    agreement: bool,
) -> None:
    """Adds the estimates of one log. `agreement`: also the unweighted mean of outcomes of matching choices."""

    def note(name: str, found: Estimate) -> None:
        draws.setdefault(name, []).append([found.estimate, found.lower, found.upper])

    observed, clusters = ~np.isnan(outcome), logged.clusters
    weights = weigh(logged, target, observed, logged.chosen)
    note("ess", Estimate(weights.effective_sample_size))
    for place, (model, predicted) in enumerate(models.items()):
        own = {
            name: one.interval(clusters) for name, one in estimates(logged, target, outcome, predicted, weights).items()
        }
        for kind in ("dm", "dr"):
            note(f"{kind}, {model}", own[kind])
        if place == 0:
            note("ips", own["ips"])
            note("snips", own["snips"])
        if place == len(models) - 1 and agreement:
            low, high = (end.interval(clusters) for end in bounds(logged, target, outcome, predicted, weights))
            note("worst case", Estimate(own["dr"].estimate, low.lower, high.upper))
            note("bernstein", empirical_bernstein(logged, outcome, weights))
            capped = weigh(logged, target, observed, logged.chosen, CAP)
            note("dr, capped", estimates(logged, target, outcome, predicted, capped)["dr"].interval(clusters))
    if agreement:
        same = outcome[observed & (logged.of_chosen(target) > 0)]
        mean = float(same.mean()) if len(same) else None
        half = 1.96 * float(same.std(ddof=1)) / np.sqrt(len(same)) if len(same) > MIN_MATCHED else None
        note("matched", Estimate(mean) if mean is None or half is None else Estimate(mean, mean - half, mean + half))


def _figures(draws: list[Draw], truth: float) -> dict[str, Any]:
    """Bias, its standard error, RMSE, mean width, and coverage over the logs with an interval."""
    defined = np.array([one[0] for one in draws if one[0] is not None])
    ends = np.array([one[1:] for one in draws if one[1] is not None and one[2] is not None])
    return {
        "bias": float(defined.mean() - truth) if len(defined) else None,
        "bias_error": float(defined.std(ddof=1) / np.sqrt(len(defined))) if len(defined) > 1 else None,
        "rmse": float(np.sqrt(np.square(defined - truth).mean())) if len(defined) else None,
        "width": float((ends[:, 1] - ends[:, 0]).mean()) if len(ends) else None,
        "coverage": float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()) if len(ends) else None,
        "intervals": len(ends),
    }


def _table(rows: list[dict[str, Any]], outcome: str) -> str:
    """A Markdown table: bias / RMSE / coverage of each estimator; scores in points, costs in USD per 1,000."""
    scale = 100 if outcome == "score" else 1000
    names = SHOWN if outcome == "score" else ("ips", "snips", "dm, calibrated", "dr, calibrated")
    columns = ["logging policy", "decisions", "target", "true value", "supported", "eff. n", *names]
    columns += ["worst case", "Bernstein"] if outcome == "score" else []
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        if row["outcome"] != outcome:
            continue
        cells = [row["logging"], f"{row['decisions']:,}", row["target"], f"{scale * row['truth']:.3g}"]
        cells += [f"{row['supported']:.0%}", f"{row['ess']:.0f}"]
        cells += [_cell(row["estimators"][name], scale) for name in names]
        if outcome == "score":
            cells += [_coverage(row["estimators"][name], scale) for name in ("worst case", "bernstein")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: dict[str, Any], scale: float) -> str:
    if figure["bias"] is None:
        return DASH
    covered = DASH if figure["coverage"] is None else f"{100 * figure['coverage']:.0f}"
    return f"{scale * figure['bias']:+.2g} / {scale * figure['rmse']:.2g} / {covered}"


def _coverage(figure: dict[str, Any], scale: float) -> str:
    if figure["coverage"] is None:
        return DASH
    return f"{scale * figure['width']:.0f} wide / {100 * figure['coverage']:.0f}"


if __name__ == "__main__":
    main(OffPolicyConfig, run)
