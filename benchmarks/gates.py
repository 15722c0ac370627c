"""Gate decisions for a better, an equal, a worse and broken candidates, and how often equal candidates pass.

Fits the candidates on one split of real outcomes, evaluates and registers them in a registry of its own, and promotes
them in order through the gates of the policy:

  weak        the first champion, trained on `few` queries
  better      trained on all training queries, against `weak`
  equal       the same fit with another seed of folds and trunk, against `better`
  worse       trained on `few` queries, against `equal`
  NaN, truncated, fewer models: broken copies of `better`, against `equal`

Contenders that OUTPUT has are not fitted again. Then fits cheap routers with `seeds` seeds on all training queries
and on fewer, and judges each against the fit of seed 0 on all: the share that passes is the power of the gates for
equal candidates, and their error for worse ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from jobs.promote import POLICY
from prefill_router import registry
from prefill_router.cli import main
from prefill_router.experiments.predict import PREFILL, predict_test
from prefill_router.experiments.provenance import provenance
from prefill_router.files import write_json
from prefill_router.locations import Location
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.gates import Verdict
from prefill_router.metrics.paired import CANDIDATE, CHAMPION, paired_figures
from prefill_router.metrics.predictions import Predictions, RouterPredictions, read_predictions, write_predictions
from prefill_router.outcomes.splits import Split
from prefill_router.pool import Pool
from prefill_router.routing.checkpoint import load_checkpoint, save_checkpoint
from prefill_router.routing.config import FitConfig
from prefill_router.routing.fit import fit_router
from prefill_router.routing.router import Router
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.signals.join import Signals
from prefill_router.workflows.gate_policy import GatePolicy, load_policy
from prefill_router.workflows.gating import relative_gates
from prefill_router.workflows.inputs import SignalsConfig, load_signals, split_signals
from prefill_router.workflows.promote import PromoteConfig
from prefill_router.workflows.promote import run as promote

CHEAP = FitConfig(  # one layer and two members: seconds of one core
    scheme="75/10/15",
    strategy="fixed",
    fixed="mean_L5",
    each_pooling=False,
    stack=(),
    margin=False,
    lengths="median",
    trunk=TrunkConfig(widths=(64,), members=2, kept=2, max_epochs=30),
)


class GatesConfig(SignalsConfig):
    """Inputs, the policy, and the numbers of fits."""

    policy: Annotated[Location, Field(description="gate policy, a YAML file")] = POLICY
    fit: FitConfig = CHEAP
    few: Annotated[int, Field(ge=50, description="training queries of the weak and the worse candidate")] = 300
    seeds: Annotated[int, Field(ge=0, description="cheap fits per number of training queries")] = 20
    sizes: Annotated[
        tuple[int, ...], Field(description="training queries of further cheap fits; all of them are always fitted")
    ] = (1600, 800, 400)


@dataclass(frozen=True)
class Contender:
    """A saved checkpoint and its evaluation folder."""

    name: str
    router: Router
    checkpoint: Path
    evaluation: Path | None = None


def run(config: GatesConfig) -> str:
    """Promote better, equal, worse and broken candidates; count equal ones that pass; write OUTPUT/gates.json."""
    shutil.rmtree(config.output / "registry", ignore_errors=True)
    os.environ["MLFLOW_TRACKING_URI"] = registry.sqlite_uri(config.output / "registry" / "mlflow.db")
    policy = load_policy(config.policy)
    pool, signals = load_signals(config)
    split = split_signals(signals, config.fit.seed, config.fit.scheme)
    fits = [
        ("weak", config.few, 0, 1),
        ("better", len(split.train), 0, 0),
        ("equal", len(split.train), 1, 0),
        ("worse", config.few, 0, 2),
    ]
    made = {name: _fit(name, n, seed, draw, config, pool, signals, split) for name, n, seed, draw in fits}
    decisions = [_promote(made["weak"], None, config, policy)]
    champion = made["weak"]
    for name in ("better", "equal", "worse"):
        decisions.append(_promote(made[name], champion, config, policy))
        champion = champion if decisions[-1]["refused"] else made[name]
    for broken in _broken(made["better"], config.output):
        decisions.append(_promote(broken, champion, config, policy, broken.name == "truncated"))
    for row in decisions:
        print(f"{row['candidate']:<14} against {row['champion']:<8} {'refused' if row['refused'] else 'promoted'}")
        print(f"    {row['told']}")
    rates = _rates(config, policy, pool, signals) if config.seeds else []
    write_json(config.output / "gates.json", {"decisions": decisions, "rates": rates, "policy": policy.model_dump()})
    right = [row["refused"] == (row["candidate"] not in ("weak", "better", "equal")) for row in decisions]
    return f"{sum(right)} of {len(right)} decisions as expected; figures in {config.output / 'gates.json'}"


def _fit(
    name: str, n: int, seed: int, draw: int, config: GatesConfig, pool: Pool, signals: Signals, split: Split
) -> Contender:
    """Fits on `n` training queries, saves the checkpoint and its evaluation. The split is that of `config.fit`."""
    folder, evaluation = config.output / name / "checkpoint", config.output / name / "evaluation"
    if (evaluation / "provenance.json").exists():
        return Contender(name, load_checkpoint(folder), folder, evaluation)
    print(f"fit {name}: {n:,} training queries", flush=True)
    part = replace(split, train=_drawn(split.train, n, draw))
    fit = config.fit.model_copy(update={"seed": config.fit.seed + seed})
    router = fit_router(signals, pool, part, fit, provenance(signals, part)).router
    recorded = dict(router.manifest["fit"]) | {"seed": config.fit.seed}  # the seed of the split
    router = save_checkpoint(replace(router, manifest={**router.manifest, "fit": recorded}), folder)
    predictions, _ = predict_test(router, signals, split, baselines=False)
    evaluation.mkdir(parents=True, exist_ok=True)
    write_predictions(predictions, evaluation / "predictions.parquet")
    write_json(evaluation / "metrics.json", evaluate(predictions, n_resamples=200))
    write_json(evaluation / "provenance.json", {"checkpoint": router.id})
    return Contender(name, router, folder, evaluation)


def _drawn(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(rows, min(n, len(rows)), replace=False))


def _broken(good: Contender, output: Path) -> list[Contender]:
    """Copies of a contender that load or register, but cannot serve."""
    router, (weight, bias) = good.router, good.router.ensemble.layers[0]
    nan = replace(
        router, ensemble=replace(router.ensemble, layers=((weight * np.nan, bias), *router.ensemble.layers[1:]))
    )
    fewer = replace(router, pool=Pool(models=router.pool.models[:-2]))
    routers = {"NaN": nan, "fewer models": fewer, "truncated": replace(router, chosen_lambda=0.5)}
    folders = {name: output / name.replace(" ", "-") / "checkpoint" for name in routers}
    return [Contender(name, save_checkpoint(one, folders[name]), folders[name]) for name, one in routers.items()]


def _promote(
    candidate: Contender,
    champion: Contender | None,
    config: GatesConfig,
    policy: GatePolicy,
    truncate: bool = False,
) -> dict[str, Any]:
    number = registry.register(candidate.checkpoint).number
    if truncate:  # in the store, after it was registered
        checkpoint = registry.checkpoint_of(number)
        for file in (config.output / "registry").rglob("checkpoint.safetensors"):
            if checkpoint in (file.parent / "manifest.json").read_text():
                file.write_bytes(file.read_bytes()[:-8])
    promotion = promote(
        PromoteConfig(
            version=number,
            evaluation=candidate.evaluation,
            outcomes=config.outcomes,  # their cost models differ, since they were trained on different queries
            activations=config.activations,
            output=config.output / "verdicts",
        ),
        policy,
    )
    return {
        "candidate": candidate.name,
        "champion": "none" if champion is None else champion.name,
        "refused": promotion.refused,
        "told": promotion.summary,
        "verdict": None if promotion.verdict is None else promotion.verdict.to_json(),
    }


def _rates(config: GatesConfig, policy: GatePolicy, pool: Pool, signals: Signals) -> list[dict[str, Any]]:
    """Per number of training queries: the share of cheap fits that each gate lets pass, and their mean differences."""
    split = split_signals(signals, config.fit.seed, CHEAP.scheme)

    def predicted(n: int, seed: int) -> Predictions:
        path = config.output / "cheap" / f"{n}-{seed}.parquet"
        if path.exists():
            return read_predictions(path)
        part = replace(split, train=_drawn(split.train, n, seed))
        fit = CHEAP.model_copy(update={"seed": config.fit.seed + seed})
        router = fit_router(signals, pool, part, fit, provenance(signals, part)).router
        path.parent.mkdir(exist_ok=True)
        write_predictions(predict_test(router, signals, split, baselines=False)[0], path)
        return read_predictions(path)

    champion = predicted(len(split.train), 0)
    rows = []
    for n in (len(split.train), *(size for size in config.sizes if size < len(split.train))):
        found = []
        for seed in range(1, config.seeds + 1):
            print(f"cheap fit {seed} of {config.seeds}: {n:,} training queries", flush=True)
            found.append(_judged(champion, predicted(n, seed).routers[PREFILL], policy))
        rows.append({"training_queries": n, "fits": len(found), **_summary(found)})
        print(_line(rows[-1]), flush=True)
    return rows


def _judged(champion: Predictions, candidate: RouterPredictions, policy: GatePolicy) -> dict[str, Any]:
    assert policy.benchmarks is not None
    routers = {CHAMPION: champion.routers[PREFILL], CANDIDATE: candidate}
    paired = paired_figures(
        replace(champion, routers=routers),
        level=policy.level,
        n_resamples=policy.resamples,
        seed=policy.seed,
        min_benchmark=policy.benchmarks.min_queries,
    )
    found = relative_gates(paired, policy)
    return {
        "passed": Verdict(tuple(found)).passed,
        "gates": {gate.name: gate.status == "passed" for gate in found},
        "differences": {
            name: [figure.difference.estimate, figure.difference.lower, figure.difference.upper]
            for name, figure in paired.figures.items()
        },
    }


def _summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names, gates = found[0]["differences"], found[0]["gates"]
    differences = {name: np.array([one["differences"][name] for one in found], dtype=float) for name in names}
    return {
        "passed": float(np.mean([one["passed"] for one in found])),
        "gates": {name: float(np.mean([one["gates"][name] for one in found])) for name in gates},
        "mean_difference": {name: float(values[:, 0].mean()) for name, values in differences.items()},
        "sd_difference": {name: float(values[:, 0].std(ddof=1)) for name, values in differences.items()},
        "half_width": {name: float((values[:, 2] - values[:, 1]).mean() / 2) for name, values in differences.items()},
        "fits_in_full": list(found),
    }


def _line(row: dict[str, Any]) -> str:
    gates = ", ".join(f"{name} {share:.2f}" for name, share in row["gates"].items())
    means = ", ".join(
        f"{name} {value:+.4f} (sd {row['sd_difference'][name]:.4f}, half-width {row['half_width'][name]:.4f})"
        for name, value in row["mean_difference"].items()
    )
    return f"{row['training_queries']:,} queries: {row['passed']:.2f} pass; {gates}\n    {means}"


if __name__ == "__main__":
    main(GatesConfig, run)
