"""Ablation of the default router, and comparison with other configurations, over split seeds.

Without `configs`, one part of the default changes at a time: the trunk (to logistic regression or one trunk per
target), the ensemble, the calibration or the layers. With `configs`, these configurations of jobs.train (such as
best.yaml of a sweep) are compared instead. All are refitted at every seed on the same training queries and evaluated on
the same test queries with the figures of jobs.evaluate. A difference is the default minus the other, paired by seed.

A configuration that was chosen on the training part of one seed depends on labels of other seeds' test queries. Only
the test queries of that seed are independent of the choice.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator
from scipy.special import expit
from threadpoolctl import threadpool_limits

from prefill_router.cli import main
from prefill_router.files import read_yaml, sha256_strings, write_atomically, write_json
from prefill_router.locations import Location
from prefill_router.metrics import seeds
from prefill_router.metrics.evaluate import REFERENCE, evaluate
from prefill_router.metrics.predictions import (
    Predictions,
    RouterPredictions,
    read_predictions,
    write_predictions,
)
from prefill_router.outcomes.splits import Scheme, Split
from prefill_router.pool import Pool
from prefill_router.routing.calibration import PlattScaling, fit_calibrator
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import best_lambda, fit_router
from prefill_router.routing.router import Router
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.signals.join import Signals
from prefill_router.signals.logistic import fit_logistic
from prefill_router.signals.roc_auc import auc_per_model
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals
from prefill_router.workflows.train import TrainConfig

# Changed parts of the default: fields of FitConfig.
PARTS: dict[str, dict[str, object]] = {
    "one member": {"trunk": TrunkConfig(members=1, kept=1)},
    "all ten members": {"trunk": TrunkConfig(kept=10)},
    "isotonic": {"calibrator": "isotonic"},
    "one block a target": {"each_pooling": False},
    "two layers of each pooling": {"layers_per_target": 2},
    "three layers of each pooling": {"layers_per_target": 3},
    "layers by Fisher's J": {"strategy": "fisher"},
}
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression, tuned on the calibration part
FIGURES: tuple[tuple[str, ...], ...] = (
    ("auc",),
    ("brier",),
    ("ece",),
    ("p_auccc_exact",),
    ("p_auccc_exact_over_hull",),
    ("routed_to_accuracy",),
    ("headroom_captured_at_chosen_lambda",),
)


class AblationConfig(SignalsConfig):
    """Inputs, and the configurations to compare with the default."""

    configs: Annotated[
        dict[str, Location] | None,
        Field(description="configurations of jobs.train by name; none: the parts of the default, one at a time"),
    ] = None
    seeds: Annotated[int, Field(ge=2, description="split seeds, from 0")] = 5
    scheme: Annotated[
        Scheme,
        Field(description="split scheme of all configurations; without configs 75/10/15, which needs one fit, not six"),
    ] = "75/10/15"

    @model_validator(mode="after")
    def _parts_have_a_calibration_part(self) -> AblationConfig:
        if not self.configs and self.scheme != "75/10/15":
            raise ValueError(
                f"scheme: got {self.scheme}, but the parts are calibrated on the calibration part of 75/10/15; give "
                "configs, or leave the scheme out"
            )
        return self


def run(config: AblationConfig) -> str:
    """Fit the default router and others at several split seeds; write their test figures and differences."""
    threadpool_limits(1)
    pool, signals = load_signals(config)
    others = {name: read_yaml(path, TrainConfig).fit for name, path in (config.configs or {}).items()}
    key = sha256_strings(
        [
            signals.outcomes.digest(),
            *(dataset.digest for dataset in signals.activations.values()),
            config.scheme,
            *(f"{name} {fit.model_dump_json()}" for name, fit in others.items()),
        ]
    )[:16]
    by_seed = {}
    for seed in range(config.seeds):
        path = config.output / key / f"seed{seed}.parquet"  # kept for interrupted runs
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_predictions(_predict(pool, signals, seed, config.scheme, others), path)
        by_seed[seed] = evaluate(read_predictions(path), n_resamples=0, seed=seed)
    summary = seeds.across_seeds(by_seed)
    table = seeds.markdown(summary, {path: seeds.HEADINGS[path] for path in FIGURES})
    write_json(config.output / "ablation.json", {"config": config.model_dump(mode="json"), **summary})
    write_atomically(config.output / "ablation.md", lambda place: place.write_text(table, encoding="utf-8"))
    print(f"\n{table}")
    return f"{len(summary['routers'])} configurations x {config.seeds} seeds; table in {config.output / 'ablation.md'}"


def _predict(pool: Pool, signals: Signals, seed: int, scheme: Scheme, others: dict[str, FitConfig]) -> Predictions:
    """Predictions of the test split of `seed` by the default, and by `others` or the default with changed parts."""
    outcomes, base = signals.outcomes, FitConfig(seed=seed, scheme=scheme)
    split = split_signals(signals, seed, scheme)
    default = _fit(REFERENCE, pool, signals, split, base)
    routers = {REFERENCE: _test(default, signals, split)}
    if not others:
        routers |= {
            "logistic regression": _logistic(default, signals, split),
            "a trunk for each target": _separate(default, signals, split, base),
            "not calibrated": _test(replace(default, calibrator=PlattScaling(np.ones(1), np.zeros(1))), signals, split),
        }
        others = {name: base.model_copy(update=changes) for name, changes in PARTS.items()}
        final = signals.final_layer()
        others["final layer alone"] = base.model_copy(
            update={"mode": "single", "encoders": final.encoder, "strategy": "fixed", "fixed": final.column}
        )
    for name, fit in others.items():
        own = fit.model_copy(update={"seed": seed, "scheme": scheme})
        routers[name] = _test(_fit(name, pool, signals, split, own), signals, split)
    test, n_tokens = split.test, signals.n_tokens[default.counting_encoder]
    cost = default.costs.estimate(n_tokens[test], outcomes.input_tokens[test], outcomes.prompt_bytes[test])
    return Predictions(
        outcomes.query_ids[test],
        outcomes.benchmarks[test],
        outcomes.groups[test],
        outcomes.models,
        outcomes.correct[test],
        cost,
        default.costs.normalise(cost),
        routers,
    )


def _fit(name: str, pool: Pool, signals: Signals, split: Split, fit: FitConfig) -> Router:
    began = time.process_time()
    fitted = fit_router(signals, pool, split, fit, {})
    print(
        f"  {name}: held-out AUC {fitted.held_out_figures['held_out_auc']:.4f}, "
        f"{time.process_time() - began:.0f} CPU s",
        flush=True,
    )
    return fitted.router


def _test(router: Router, signals: Signals, split: Split) -> RouterPredictions:
    p, _ = router.confidences(router.features(signals.states))
    return RouterPredictions(p[split.test], router.chosen_lambda)


def _logistic(default: Router, signals: Signals, split: Split) -> RouterPredictions:
    """Logistic regression per target on the features of the default, with Platt scaling.

    C has the highest AUC on the calibration part.
    """
    correct, features, rows = signals.outcomes.correct, default.features(signals.states), split.calibration
    z = features / features[split.train].std()
    fits = [fit_logistic(z[split.train], correct[split.train], c) for c in PENALTIES]
    raw = max(
        (expit(z @ weights[:-1] + weights[-1]) for weights in fits),
        key=lambda p: float(np.nanmean(auc_per_model(correct[rows], p[rows]))),
    )
    return _routed(fit_calibrator("platt", raw[rows], correct[rows])(raw), default, signals, split)


def _separate(default: Router, signals: Signals, split: Split, base: FitConfig) -> RouterPredictions:
    """One router per target, without the labels and layers of the other targets."""
    outcomes, columns = signals.outcomes, []
    for index, model in enumerate(default.pool.models):
        alone = replace(
            outcomes,
            models=(model.name,),
            **{name: getattr(outcomes, name)[:, [index]] for name in ("correct", "input_tokens", "output_tokens")},
        )
        router = _fit(f"{model.name} alone", Pool(models=(model,)), replace(signals, outcomes=alone), split, base)
        columns.append(router.confidences(router.features(signals.states))[0])
    return _routed(np.concatenate(columns, axis=1), default, signals, split)


def _routed(p: np.ndarray, default: Router, signals: Signals, split: Split) -> RouterPredictions:
    """Predictions of the test split with the best lambda on the calibration part."""
    n_tokens = signals.n_tokens[default.counting_encoder]
    lam = best_lambda(p, signals.outcomes, split.calibration, default.costs, n_tokens)
    return RouterPredictions(p[split.test], lam)


if __name__ == "__main__":
    main(AblationConfig, run)
