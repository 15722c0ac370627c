"""Drift job: a server's decision log in, tests of drift, alerts and a page out.

Writes OUTPUT/drift.json, OUTPUT/alerts.json and OUTPUT/drift.html (docs/drift.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from prefill_router import registry
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.decisions.log import read_decisions
from prefill_router.drift.alerts import alerts, verdict
from prefill_router.drift.check import Settings, check_drift
from prefill_router.drift.features import feature_test, reference_novelty
from prefill_router.drift.traffic import read_traffic, reference_confidences
from prefill_router.errors import InputError
from prefill_router.locations import LocalPath, Location
from prefill_router.metrics.predictions import read_predictions
from prefill_router.registry.versions import at_hand
from prefill_router.reports.drift_page import write_drift
from prefill_router.routing.checkpoint import load_checkpoint
from prefill_router.version import code_version


class DriftConfig(FrozenModel):
    """The log, the reference, and the settings of the tests."""

    log: Annotated[LocalPath, Field(description="folder of the decision log, gateway.log.folder of the server")]
    checkpoint: Annotated[str, Field(min_length=1, description="checkpoint folder or registry URI that decided")]
    output: Annotated[Location, Field(description="output folder")]
    evaluation: Annotated[
        Location | None,
        Field(description="folder of jobs.evaluate for this checkpoint; null: confidences are not compared"),
    ] = None
    activations: Annotated[
        tuple[Location, ...],
        Field(description="activations datasets with the evaluation's queries; empty: features are not compared"),
    ] = ()
    baseline: Annotated[
        int, Field(ge=0, description="the first decisions of the log are the reference; 0: the training is")
    ] = 0
    recent: Annotated[
        int, Field(ge=200, description="most recent decisions that the tests read; the sequential alarms read all")
    ] = 2_000
    window: Annotated[int, Field(ge=50, description="decisions per window of the novelty over time")] = 500
    prompts: Annotated[
        int, Field(ge=50, le=5_000, description="logged prompts to encode for the feature test, at most")
    ] = 500
    alpha: Annotated[
        float, Field(gt=0, le=0.5, description="false alarm rate of each test; that of a sequential alarm is for ever")
    ] = 0.01
    tolerance: Annotated[
        float, Field(ge=0, le=0.2, description="accepted difference of mean feedback and mean confidence of a model")
    ] = 0.05
    domain: Annotated[
        str, Field(min_length=1, description="field of the log's decisions that groups the calibration")
    ] = "key"
    correct_from: Annotated[
        float | None,
        Field(gt=0, le=1, description="feedback from this score on counts as 1, other as 0; null: as it is"),
    ] = None
    fail_on_alert: Annotated[bool, Field(description="exit code 1 if alerts.json lists an alert")] = False
    seed: Annotated[int, Field(ge=0, description="seed of samples, permutations and ties")] = 0

    @field_validator("activations", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value


def run(config: DriftConfig) -> str:
    """Test the traffic of a server for drift, and say whether to train again."""
    router = load_checkpoint(registry.resolve(config.checkpoint))
    log = read_decisions(config.log)
    traffic = read_traffic(log, router.pool.names, router.id, config.domain, config.correct_from)
    print(
        f"{len(traffic):,} decisions of {router.id} ({traffic.others:,} of other checkpoints left out), "
        f"{len(traffic.feedback):,} with feedback",
        flush=True,
    )
    predictions = None if config.evaluation is None else read_predictions(config.evaluation / "predictions.parquet")
    settings = Settings(config.alpha, config.recent, config.window, config.tolerance, config.baseline, config.seed)
    if config.baseline >= len(traffic):
        raise InputError(
            f"baseline: got {config.baseline:,} of {len(traffic):,} decisions; leave some to be tested, or give 0"
        )
    test = None if predictions is None else [str(query) for query in predictions.query_ids]
    drift = check_drift(
        traffic,
        settings,
        reference_novelty(router, config.activations, test),
        None if predictions is None else reference_confidences(predictions, router.pool.names),
        feature_test(
            traffic,
            router,
            config.activations,
            test,
            config.prompts,
            config.recent,
            config.baseline,
            config.seed,
            progress=True,
        ),
    )
    found = alerts(drift)
    decided = verdict(drift, found)
    provenance = {
        **{name: ", ".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in config},
        "checkpoint_id": router.id,
        "code_version": code_version(),
    }
    page = write_drift(config.output, drift, found, decided, provenance)
    for alert in found:
        print(f"{alert.severity}: {alert.text}; {alert.what_to_do}")
    print(f"page: {page}", flush=True)
    if config.fail_on_alert and found:
        print(f"drift: {decided}", flush=True)
        raise SystemExit(1)
    return str(decided)


def plan(config: DriftConfig) -> Iterator[str]:
    """What a dry run says: decisions, and prompts to encode. Raises InputError as `run` does. Asks no registry."""
    folder, log = at_hand(config.checkpoint), read_decisions(config.log)
    if folder is None:
        yield f"tests {len(log):,} decisions, for {config.checkpoint}; the registry is not asked now"
        return
    router = load_checkpoint(folder)
    traffic = read_traffic(log, router.pool.names, router.id)
    logged = sum(prompt is not None for prompt in traffic.decisions.prompts)
    yield f"tests {len(traffic):,} decisions of checkpoint {router.id} and {len(traffic.feedback):,} feedbacks"
    if config.activations or config.baseline:
        yield f"encodes {min(logged, config.prompts):,} prompts of the log in this process"


if __name__ == "__main__":
    main(DriftConfig, run, plan=plan)
