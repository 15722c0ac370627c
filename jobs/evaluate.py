"""Evaluates a checkpoint on its test split beside tuned baselines: metrics.json, predictions.parquet, report.html."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from jobs.cli import main
from jobs.inputs import SignalsConfig, load, split
from prefill_router import registry
from prefill_router.errors import InputError
from prefill_router.evaluation.evaluate import evaluate
from prefill_router.evaluation.predict import predict_test
from prefill_router.evaluation.predictions import write_predictions
from prefill_router.evaluation.report import number, write_report
from prefill_router.files import write_json
from prefill_router.outcomes.table import read_note
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.routing.fit import FitConfig
from prefill_router.version import code_version


class EvaluateConfig(SignalsConfig):
    """Inputs, the checkpoint, and how many bootstrap resamples."""

    checkpoint: Annotated[Path, Field(description="folder of the checkpoint to evaluate")]
    baselines: Annotated[bool, Field(description="fit category prior, kNN vote and unified MLP beside it")] = True
    resamples: Annotated[int, Field(ge=0, description="bootstrap resamples of the test queries, by group")] = 1000


def run(config: EvaluateConfig) -> str:
    """Evaluate a checkpoint on the test split that it has not seen; write metrics, predictions and a report."""
    router = load_checkpoint(config.checkpoint)
    pool, signals = load(config)
    if pool != router.pool:
        raise InputError(f"pool: {config.pool} is not the pool that the checkpoint was trained with (models, order or "
                         f"prices differ); evaluate with {config.checkpoint / 'pool.yaml'}, or train again")
    if signals.outcomes.digest() != router.manifest["outcomes_digest"]:
        raise InputError("outcomes: they are not those that the checkpoint was trained on (pool, prompts or labels "
                         "differ), so its test split is not known; evaluate with the same outcomes and pool")
    fit = FitConfig.model_validate(router.manifest["fit"])
    parts = split(signals, fit.seed, fit.scheme)
    with registry.track("evaluate", config, tags={"checkpoint_id": router.id}) as tracked:
        predictions, settings = predict_test(router, signals, parts, baselines=config.baselines, progress=True)
        print(f"bootstrap: {config.resamples:,} resamples of {len(predictions.query_ids):,} test queries", flush=True)
        metrics = evaluate(predictions, n_resamples=config.resamples, seed=fit.seed)
        write_predictions(predictions, config.output / "predictions.parquet")
        write_json(config.output / "metrics.json", metrics)
        encoders = [dataset.encoder for dataset in signals.activations.values()]
        provenance = {"notice": read_note(config.outcomes),
                      "encoder": ", ".join(f"{encoder.model} ({encoder.architecture}, {encoder.attention})"
                                           for encoder in encoders),
                      "checkpoint": router.id, "command": " ".join(["python -m jobs.evaluate", *sys.argv[1:]]),
                      "code": code_version(), "outcomes": router.manifest["outcomes_digest"],
                      "activations": router.manifest["activations_digest"], "split": f"{fit.scheme}, seed {fit.seed}",
                      "baselines": settings, "configuration": config.model_dump(mode="json"),
                      "fit": router.manifest["fit"]}
        write_report(config.output, predictions, metrics, provenance)
        figures = metrics["routers"]["prefill"]
        tracked.log_metrics({name: figures[name]["estimate"] for name in registry.HEADLINE})
        for name in ("metrics.json", "predictions.parquet", "report.html"):
            tracked.log_artifact(config.output / name, "evaluation")
    aucs = ", ".join(f"{name} {number(figure['auc']['estimate'], 4)}" for name, figure in metrics["routers"].items())
    return f"AUC {aucs}; report: {config.output / 'report.html'}"


if __name__ == "__main__":
    main(EvaluateConfig, run)
