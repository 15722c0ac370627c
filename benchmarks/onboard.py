"""Onboarding curves: models left out of the training join from n labels, against baselines and complete training.

One router is trained on all models of the pool. For each held-out model another is trained without it (75/10/15,
without a third of the training part). The model joins from n labelled queries that the trunk did not read: the third
that was left out, and the calibration part. The complete router is trained on the same queries as the others.
Checkpoints and records in the output folder are not made again. All figures are those of the test part:

- `constant`: the rate of right answers among the labels;
- `scratch`: Bayesian logistic regression on the router's features, without a prior from other targets;
- `targets`, `hidden`: the heads of routing/onboarding.py; `chosen`: the one with the highest evidence;
- `platt`: `chosen` with Platt scaling on its held-out predictions; `bagged`: the mean over bootstrap samples;
- `seen`: `chosen`, from labels of queries that the trunk was trained on;
- `complete`: the router that was trained with all labels of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field
from scipy.stats import t as student
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from prefill_router.cli import main
from prefill_router.experiments.onboarding import Rule, held_out, missing_evidence, smoothed_rate
from prefill_router.files import read_json, write_atomically, write_json
from prefill_router.outcomes.splits import Split, make_folds, split_queries
from prefill_router.outcomes.table import Outcomes
from prefill_router.pool import Pool
from prefill_router.routing.added import HeadInputs
from prefill_router.routing.calibration import fit_pooled_platt
from prefill_router.routing.checkpoint import MANIFEST, load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.routing.laplace import Prior, expected_sigmoid, find_mode
from prefill_router.routing.onboarding import Material, TrunkRows, fit_head
from prefill_router.routing.router import Router
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.signals.join import Signals
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.workflows.inputs import SignalsConfig, load_signals

SCALES = (0.003, 0.01, 0.03, 0.1, 0.3)  # standard deviations of the weights of `scratch` a priori
HEADS = ("constant", "scratch", "targets", "hidden", "chosen", "platt", "seen", "bagged", "complete")
LEFT_OUT = 3  # one in three of the training queries gives labels instead
FIT = FitConfig(scheme="75/10/15", trunk=TrunkConfig(members=5, kept=5), margin=False, lengths="median")
SEEN = (100, 500)  # numbers of labels at which `seen` is measured
BAGS, BAGGED = 10, (50, 200)  # bootstrap samples, and the numbers of labels at which `bagged` is measured


class OnboardBenchConfig(SignalsConfig):
    """Inputs, the held-out models, and the numbers of labels."""

    models: Annotated[
        tuple[str, ...], Field(description="models to hold out, one at a time; empty: four, evenly by accuracy")
    ] = ()
    labels: Annotated[tuple[int, ...], Field(description="numbers of labels")] = (10, 20, 50, 100, 200, 500, 1000)
    draws: Annotated[int, Field(ge=2, description="random draws of each number of labels")] = 5
    seed: Annotated[int, Field(ge=0, description="seed of split, training and draws")] = 0


@dataclass(frozen=True)
class Queries:
    """What heads read of a part of the split, and the labels of the held-out model; all are labelled."""

    inputs: HeadInputs
    features: Float[np.ndarray, "queries features"]
    correct: Float[np.ndarray, " queries"]
    groups: np.ndarray

    def take(self, rows: Int[np.ndarray, " part"]) -> Queries:
        return Queries(self.inputs.take(rows), self.features[rows], self.correct[rows], self.groups[rows])


def run(config: OnboardBenchConfig) -> str:
    """Measure heads of held-out models over the number of labels; write tables and figures."""
    threadpool_limits(2)
    pool, signals = load_signals(config)
    outcomes = signals.outcomes
    split, fresh = leave_out(outcomes, split_queries(outcomes, config.seed, "75/10/15"), config.seed)
    fit = FIT.model_copy(update={"seed": config.seed})
    complete = _trained(config.output / "complete", signals, pool, split, fit)
    p_complete = complete.confidences(complete.features(signals.states))[0][split.test]
    names = config.models or spread_by_accuracy(outcomes, 4)
    records: list[dict[str, Any]] = []
    for name in tqdm(names, desc="held-out models"):
        file = config.output / "records" / f"{pool.indices([name])[0]}.json"
        if file.exists():
            records += read_json(file)
            continue
        own: list[dict[str, Any]] = []
        (at,) = pool.indices([name])
        parts, rows = _parts(config.output / "without" / str(at), signals, pool, split, fresh, at, fit)
        known = ~np.isnan(outcomes.correct[split.test, at])
        upper = _figures(p_complete[known, at], parts["test"].correct)
        own.append({"model": name, "labels": 0, "draw": 0, "complete": upper})
        for labels in config.labels:
            if labels > len(parts["fresh"].correct):
                continue
            for draw in range(config.draws):
                figures = _draw(parts, rows, labels, (config.seed, at, labels, draw))
                own.append({"model": name, "labels": labels, "draw": draw, **figures})
        write_json(file, own)
        records += own
    text = "\n\n".join([_table(records, "auc"), _table(records, "brier"), _rule(records), _by_model(records)])
    write_json(config.output / "onboard.json", {"config": config.model_dump(mode="json"), "records": records})
    write_atomically(config.output / "onboard.md", lambda place: place.write_text(text, encoding="utf-8"))
    print(f"\n{text}\n")
    return f"{len(names)} held-out models x {config.draws} draws; tables in {config.output / 'onboard.md'}"


def spread_by_accuracy(outcomes: Outcomes, n: int) -> tuple[str, ...]:
    """`n` models of the pool at even ranks of accuracy, the best and the worst among them."""
    order = np.argsort(np.nanmean(outcomes.correct, axis=0))
    places = np.linspace(0, len(order) - 1, min(n, len(order))).round().astype(int)
    return tuple(outcomes.models[at] for at in order[places])


def leave_out(outcomes: Outcomes, split: Split, seed: int) -> tuple[Split, Int[np.ndarray, " fresh"]]:
    """The split without a third of its training part, and the queries that the trunk does not read."""
    folds = make_folds(outcomes, split.train, seed, LEFT_OUT)
    fresh = np.sort(np.concatenate([split.train[folds == 0], split.calibration]))
    return replace(split, train=split.train[folds != 0]), fresh


def _trained(folder: Path, signals: Signals, pool: Pool, split: Split, fit: FitConfig) -> Router:
    """The router in `folder`; it is trained if there is none from these inputs."""
    lineage = {"inputs": f"{signals.digest} {signals.outcomes.digest()} {signals.outcomes.take(split.train).digest()}"}
    if (folder / MANIFEST).exists():
        router = load_checkpoint(folder)
        if router.manifest["inputs"] == lineage["inputs"]:
            return router
    return save_checkpoint(fit_router(signals, pool, split, fit, lineage).router, folder)


def _parts(
    folder: Path,
    signals: Signals,
    pool: Pool,
    split: Split,
    fresh: Int[np.ndarray, " fresh"],
    at: int,
    fit: FitConfig,
) -> tuple[dict[str, Queries], TrunkRows]:
    """The labelled queries of each part for the model at `at`, by a router that is trained without it."""
    outcomes = signals.outcomes
    keep = [index for index in range(len(pool.models)) if index != at]
    without = replace(
        outcomes,
        models=tuple(outcomes.models[index] for index in keep),
        **{name: getattr(outcomes, name)[:, keep] for name in ("correct", "input_tokens", "output_tokens")},
        fractions=None if outcomes.fractions is None else outcomes.fractions[:, keep],
    )
    smaller = Pool(models=tuple(pool.models[index] for index in keep))
    router = _trained(folder, replace(signals, outcomes=without), smaller, split, fit)
    features = router.features(signals.states)
    hidden = router.ensemble.hidden(features)
    inputs = HeadInputs.of(hidden, router.trained_confidences(hidden, features)[0])
    parts = {}
    for name, rows in (("seen", split.train), ("fresh", fresh), ("test", split.test)):
        rows = rows[~np.isnan(outcomes.correct[rows, at])]
        correct = outcomes.correct[rows, at].astype(np.float64)
        parts[name] = Queries(inputs.take(rows), features[rows], correct, outcomes.groups[rows])
    return parts, TrunkRows.of(router.ensemble)


def _draw(parts: dict[str, Queries], rows: TrunkRows, labels: int, seed: Sequence[int]) -> dict[str, Any]:
    """Test figures of all heads from one draw of labels, and what the rule says."""
    rng, test = np.random.default_rng(seed), parts["test"]
    fresh = parts["fresh"].take(rng.permutation(len(parts["fresh"].correct))[:labels])
    seen = parts["seen"].take(rng.permutation(len(parts["seen"].correct))[:labels])
    material = Material(fresh.inputs, fresh.correct, rows)
    fitted = {name: fit_head(material, [name]) for name in ("constant", "targets", "hidden")}
    evidence = {name: one.log_evidence[one.candidate] for name, one in fitted.items()}
    chosen = max(evidence, key=lambda name: evidence[name])
    p = {name: one.head(test.inputs)[0] for name, one in fitted.items()}
    p["constant"] = np.full(len(test.correct), smoothed_rate(fresh.correct))
    p["chosen"] = p[chosen] if chosen != "constant" else fitted["constant"].head(test.inputs)[0]
    p["scratch"] = _scratch(fresh, test.features)
    found = held_out(material, fresh.correct, fresh.groups, rng.permutation(labels) % 5)
    scaling = fit_pooled_platt(found.p[:, None], fresh.correct[:, None])
    p["platt"] = scaling(p["chosen"][:, None])[:, 0]
    if labels in SEEN:
        p["seen"] = fit_head(Material(seen.inputs, seen.correct, rows)).head(test.inputs)[0]
    if labels in BAGGED:
        p["bagged"] = fit_head(material, bags=BAGS, seed=labels).head(test.inputs)[0]
    return {
        **{name: _figures(one, test.correct) for name, one in p.items()},
        "head": chosen,
        "decides": missing_evidence(Rule(), fresh.correct, found) is None,
        "gain_alone": bool((found.gain.lower or 0.0) > 0),
    }


def _scratch(fresh: Queries, test: Float[np.ndarray, "queries features"]) -> Float[np.ndarray, " queries"]:
    """Bayesian logistic regression on the features, with the spread of highest evidence."""

    def with_one(x: np.ndarray) -> np.ndarray:
        return np.column_stack([x.astype(np.float64), np.ones(len(x))])

    x, width = with_one(fresh.features), fresh.features.shape[1] + 1
    priors = [Prior(np.zeros(width), np.diag(np.append(np.full(width - 1, scale), 2.0))) for scale in SCALES]
    best = max((find_mode(x, fresh.correct, prior) for prior in priors), key=lambda mode: mode.log_evidence)
    posterior = best.posterior()
    x = with_one(test)
    return expected_sigmoid(x @ posterior.mean, np.square(x @ posterior.factor).sum(axis=1))[0]


def _figures(p: Float[np.ndarray, " queries"], correct: Float[np.ndarray, " queries"]) -> dict[str, float]:
    return {"auc": float(auc_per_model(correct[:, None], p[:, None])[0]), "brier": float(np.square(p - correct).mean())}


def _mean(values: Sequence[float]) -> str:
    """Mean and 95 % t interval over held-out models."""
    x = np.asarray(values)
    half = student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
    return f"{x.mean():+.4f} [{x.mean() - half:+.4f}, {x.mean() + half:+.4f}]"


def _per_model(records: Sequence[dict[str, Any]], labels: int, name: str, figure: str) -> dict[str, float]:
    """The mean over draws of each model."""
    found: dict[str, list[float]] = {}
    for one in records:
        if one["labels"] == labels and name in one:
            found.setdefault(one["model"], []).append(one[name][figure])
    return {model: float(np.mean(values)) for model, values in found.items()}


def _sizes(records: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({one["labels"] for one in records} - {0})


def _table(records: Sequence[dict[str, Any]], figure: str) -> str:
    """Means over models and draws; then paired differences of `chosen` with intervals over models."""
    upper = _per_model(records, 0, "complete", figure)
    shown = [name for name in HEADS if name != "complete"]
    against = ("constant", "scratch", "targets", "hidden", "platt", "seen", "bagged", "complete")
    lines = [f"| labels | {' | '.join(shown)} | complete |", "|---" * (len(shown) + 2) + "|"]
    paired = [
        f"| labels | {' | '.join(f'chosen - {name}' for name in against)} |",
        "|---" * (len(against) + 1) + "|",
    ]
    for labels in _sizes(records):
        values = {name: _per_model(records, labels, name, figure) for name in shown} | {"complete": upper}
        cells = [f"{np.mean(list(one.values())):.4f}" if one else "" for one in values.values()]
        lines.append(f"| {labels} | {' | '.join(cells)} |")
        differences = [
            _mean([value - values[name][model] for model, value in values["chosen"].items()]) if values[name] else ""
            for name in against
        ]
        paired.append(f"| {labels} | {' | '.join(differences)} |")
    return "\n".join([f"{figure}, means over held-out models and draws:", "", *lines, "", *paired])


def _rule(records: Sequence[dict[str, Any]]) -> str:
    """How often the rule lets a head decide, and how often its test Brier score is above that of the rate."""
    lines = [
        "| labels | heads | decide | of these above the rate's Brier score | gain alone: decide | of these above "
        "| all heads above | constant, targets, hidden chosen |",
        "|---" * 8 + "|",
    ]
    for labels in _sizes(records):
        own = [one for one in records if one["labels"] == labels]
        cells = [str(labels), str(len(own))]
        for allowed in ([one for one in own if one["decides"]], [one for one in own if one["gain_alone"]]):
            cells += [str(len(allowed)), str(_bad(allowed))]
        heads = [sum(one["head"] == name for one in own) for name in ("constant", "targets", "hidden")]
        lines.append(f"| {' | '.join([*cells, str(_bad(own)), ', '.join(map(str, heads))])} |")
    return "\n".join(lines)


def _bad(records: Sequence[dict[str, Any]]) -> int:
    return sum(one["chosen"]["brier"] > one["constant"]["brier"] for one in records)


def _by_model(records: Sequence[dict[str, Any]]) -> str:
    """The AUC of `chosen` by model."""
    sizes = _sizes(records)
    lines = [f"| AUC of chosen | {' | '.join(map(str, sizes))} | complete |", "|---" * (len(sizes) + 2) + "|"]
    by_size = [_per_model(records, labels, "chosen", "auc") for labels in sizes]
    for model, upper in _per_model(records, 0, "complete", "auc").items():
        lines.append(f"| {model} | {' | '.join(f'{one[model]:.3f}' for one in by_size)} | {upper:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(OnboardBenchConfig, run)
