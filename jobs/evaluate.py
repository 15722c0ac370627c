"""Evaluates a checkpoint on its test split beside tuned baselines: metrics.json, predictions.parquet, report.html.

On request it also trains again, over further split seeds and without each benchmark, and encodes test prompts again in
other wordings. What takes long is kept under OUTPUT/again, and an interrupted run goes on from there.
Configuration and plumbing; the figures are `prefill_router.evaluation`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from jobs.cli import main
from jobs.inputs import SignalsConfig, load, split
from prefill_router import registry
from prefill_router.config import FrozenModel
from prefill_router.errors import InputError
from prefill_router.experiments import leave_one_out
from prefill_router.experiments.perturb import perturb
from prefill_router.experiments.predict import encoders_to_run, predict_perturbed, predict_test
from prefill_router.files import sha256_strings, write_json, write_parquet
from prefill_router.metrics import seeds
from prefill_router.metrics.evaluate import evaluate
from prefill_router.metrics.predictions import Predictions, read_predictions, with_overhead, write_predictions
from prefill_router.metrics.robustness import Perturbed, robustness, write_perturbed
from prefill_router.outcomes.table import read_note
from prefill_router.pool import Pool
from prefill_router.prefill.dataset import read_activations
from prefill_router.prefill.encoder import column_name
from prefill_router.reports.evaluation import number, write_report
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.fit import FitConfig, fit_router
from prefill_router.routing.router import Router
from prefill_router.semantic.baselines import FittedBaseline
from prefill_router.signals.join import Signals
from prefill_router.version import code_version

OPTIONAL = ("perturbed.parquet", "leave_one_out.parquet", "seeds.md")


class OverheadConfig(FrozenModel):
    """What a routing decision costs by itself: the encoder's time on a GPU. Not counted by default."""

    seconds_per_query: Annotated[
        float, Field(ge=0, description="counts the encoder's time as a cost of routing; needs gpu_usd_per_hour")
    ] = 0.0
    gpu_usd_per_hour: Annotated[float, Field(ge=0, description="price of the GPU that the encoder runs on")] = 0.0

    @model_validator(mode="after")
    def _both(self) -> OverheadConfig:
        if (self.seconds_per_query > 0) != (self.gpu_usd_per_hour > 0):
            raise ValueError(
                f"got seconds_per_query {self.seconds_per_query:g} and gpu_usd_per_hour "
                f"{self.gpu_usd_per_hour:g}; give both, or neither to leave the encoder's time out"
            )
        return self

    @property
    def usd_per_query(self) -> float:
        return self.seconds_per_query * self.gpu_usd_per_hour / 3600


class EvaluateConfig(SignalsConfig):
    """Inputs, the checkpoint, and what to evaluate beyond its test split."""

    checkpoint: Annotated[Path, Field(description="folder of the checkpoint to evaluate")]
    baselines: Annotated[bool, Field(description="fit category prior, kNN vote and unified MLP beside it")] = True
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples of the test queries, by group")] = 1000
    seeds: Annotated[
        int, Field(ge=1, description="split seeds: the checkpoint's own and the next ones, training again at each")
    ] = 1
    leave_one_benchmark_out: Annotated[
        bool, Field(description="true: train again without each benchmark, as many times as there are, and test on it")
    ] = False
    perturbed_queries: Annotated[
        int,
        Field(
            ge=0,
            description="test queries, drawn at random, whose prompts are worded "
            "in other ways, encoded and routed again",
        ),
    ] = 0
    overhead: OverheadConfig = OverheadConfig()


def run(config: EvaluateConfig) -> str:
    """Evaluate a checkpoint on the test split that it has not seen; write metrics, predictions and a report."""
    router = load_checkpoint(config.checkpoint)
    pool, signals = load(config)
    if pool != router.pool:
        raise InputError(
            f"pool: {config.pool} is not the pool that the checkpoint was trained with (models, order or "
            f"prices differ); evaluate with {config.checkpoint / 'pool.yaml'}, or train again"
        )
    if signals.outcomes.digest() != router.manifest["outcomes_digest"]:
        raise InputError(
            "outcomes: they are not those that the checkpoint was trained on (pool, prompts or labels "
            "differ), so its test split is not known; evaluate with the same outcomes and pool"
        )
    fit = FitConfig.model_validate(router.manifest["fit"])
    parts = split(signals, fit.seed, fit.scheme)
    if config.leave_one_benchmark_out:
        leave_one_out.check(signals.outcomes.benchmarks)
    kept = config.output / "again" / _key(config, router, signals)
    with registry.track("evaluate", config, tags={"checkpoint_id": router.id}) as tracked:
        predictions, fitted = predict_test(router, signals, parts, baselines=config.baselines, progress=True)
        predictions = with_overhead(predictions, config.overhead.usd_per_query)
        metrics = _evaluate(config, predictions, fit.seed)
        perturbed = unseen = None
        if config.perturbed_queries:
            perturbed = _perturbed(config, router, signals, predictions, fitted, fit.seed, kept)
            found = robustness(predictions, perturbed, n_resamples=config.resamples, seed=fit.seed)
            for name, figures in found.items():
                metrics["routers"][name]["robustness"] = figures
        if config.leave_one_benchmark_out:
            unseen = _leave_one_out(config, pool, signals, fit, predictions, fitted, kept)
            metrics["leave_one_benchmark_out"] = _evaluate(config, unseen, fit.seed)
        if config.seeds > 1:
            by_seed = {fit.seed: metrics}
            for seed in range(fit.seed + 1, fit.seed + config.seeds):
                again = _seed(config, pool, signals, fit.model_copy(update={"seed": seed}), router, kept)
                by_seed[seed] = _evaluate(config, again, seed)
            metrics["seeds"] = seeds.across_seeds(by_seed)
        for name in OPTIONAL:  # of a run with other options
            (config.output / name).unlink(missing_ok=True)
        write_predictions(predictions, config.output / "predictions.parquet")
        if perturbed is not None:
            write_perturbed(perturbed, config.output / "perturbed.parquet")
        if unseen is not None:
            write_predictions(unseen, config.output / "leave_one_out.parquet")
        if "seeds" in metrics:
            (config.output / "seeds.md").write_text(seeds.markdown(metrics["seeds"]), encoding="utf-8")
        write_json(config.output / "metrics.json", metrics)
        encoders = [dataset.encoder for dataset in signals.activations.values()]
        provenance = {
            "notice": read_note(config.outcomes),
            "encoder": ", ".join(
                f"{encoder.model} ({encoder.architecture}, {encoder.attention})" for encoder in encoders
            ),
            "checkpoint": router.id,
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "code": code_version(),
            "outcomes": router.manifest["outcomes_digest"],
            "activations": signals.digest,
            "split": f"{fit.scheme}, seed {fit.seed}",
            "baselines": {name: baseline.settings for name, baseline in fitted.items()},
            "configuration": config.model_dump(mode="json"),
            "fit": router.manifest["fit"],
        }
        write_json(config.output / "provenance.json", provenance)
        prompts = dict(zip(signals.outcomes.query_ids, signals.outcomes.prompts, strict=True))
        write_report(config.output, predictions, metrics, provenance, prompts=prompts, layers=_layers(router))
        figures = metrics["routers"]["prefill"]
        tracked.log_metrics({name: figures[name]["estimate"] for name in registry.HEADLINE})
        for name in ("metrics.json", "predictions.parquet", "report.html"):
            tracked.log_artifact(config.output / name, "evaluation")
    aucs = ", ".join(f"{name} {number(figure['auc']['estimate'], 4)}" for name, figure in metrics["routers"].items())
    return f"AUC {aucs}; report: {config.output / 'report.html'}"


def _evaluate(config: EvaluateConfig, predictions: Predictions, seed: int) -> dict[str, Any]:
    print(f"bootstrap: {config.resamples:,} resamples of {len(predictions):,} test queries", flush=True)
    return evaluate(predictions, n_resamples=config.resamples, seed=seed)


def _layers(router: Router) -> list[dict[str, Any]]:
    """The checkpoint's layer search, each block with the positions of the targets that read it."""
    read = [router.manifest["target_layers"][name] for name in router.pool.names]
    return [
        row
        | {
            "chosen": [
                target
                for target, layer_keys in enumerate(read)
                if [row["encoder"], column_name(row["pooling"], row["layer"])] in layer_keys
            ]
        }
        for row in router.manifest.get("layer_scores", ())
    ]


def _key(config: EvaluateConfig, router: Router, signals: Signals) -> str:
    """Where what is trained again is kept: another checkpoint, other activations or no baselines, another folder."""
    return sha256_strings([router.id, signals.digest, str(config.baselines)])[:16]


def _perturbed(
    config: EvaluateConfig,
    router: Router,
    signals: Signals,
    predictions: Predictions,
    fitted: Mapping[str, FittedBaseline],
    seed: int,
    kept: Path,
) -> Perturbed:
    from jobs import prefill  # Ray comes with it

    n = min(config.perturbed_queries, len(predictions))
    ids = set(np.random.default_rng(seed).choice(predictions.query_ids, n, replace=False))
    prompts = {
        query_id: prompt
        for query_id, prompt in zip(signals.outcomes.query_ids, signals.outcomes.prompts, strict=True)
        if query_id in ids
    }
    worded = perturb(prompts.keys(), prompts.values(), seed)
    folder = kept / f"perturbed-{sha256_strings(worded.column('prompt').to_pylist())[:16]}"
    write_parquet(folder / "prompts.parquet", worded)
    activations = {}
    for fingerprint, encoder in encoders_to_run(router, signals, config.baselines).items():
        print(
            prefill.run(
                prefill.PrefillConfig(input=folder / "prompts.parquet", output=folder / fingerprint, encoder=encoder)
            ),
            flush=True,
        )
        activations[fingerprint] = read_activations(folder / fingerprint)
    return predict_perturbed(router, fitted, signals, worded, activations)


def _leave_one_out(
    config: EvaluateConfig,
    pool: Pool,
    signals: Signals,
    fit: FitConfig,
    predictions: Predictions,
    fitted: Mapping[str, FittedBaseline],
    kept: Path,
) -> Predictions:
    parts = split(signals, fit.seed, fit.scheme)
    names = sorted(set(predictions.benchmarks))
    unseen = {}
    for index, name in enumerate(names):

        def predict(name: str = name) -> Predictions:
            return leave_one_out.predict_unseen(
                pool, signals, parts, fit, name, baselines=config.baselines, tuned=fitted
            )

        print(f"leave one benchmark out: {index + 1} of {len(names)}, {name}", flush=True)
        unseen[name] = _once(kept / "without" / f"{index:03d}.parquet", predict)
    return leave_one_out.combine(predictions, unseen)


def _seed(
    config: EvaluateConfig, pool: Pool, signals: Signals, fit: FitConfig, router: Router, kept: Path
) -> Predictions:
    """The test split of another seed, by a router trained on the rest of it as `router` was on its own."""

    def predict() -> Predictions:
        parts = split(signals, fit.seed, fit.scheme)
        again = fit_router(
            signals,
            pool,
            parts,
            fit,
            {"seed_of": router.id},
            progress=True,
        )
        return predict_test(again.router, signals, parts, baselines=config.baselines, progress=True)[0]

    print(f"seed {fit.seed}: training again", flush=True)
    predictions = _once(kept / "seeds" / f"seed{fit.seed}.parquet", predict)
    return with_overhead(predictions, config.overhead.usd_per_query)


def _once(path: Path, predict: Callable[[], Predictions]) -> Predictions:
    """What `predict` returns, kept in a file that the next run reads instead."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(predict(), path)
    return read_predictions(path)


if __name__ == "__main__":
    main(EvaluateConfig, run)
