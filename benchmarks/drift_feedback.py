"""Drift of feedback: how soon the alarm finds a model that becomes worse, and how often it errs.

In: predictions.parquet of evaluations. The feedback on a model is its recorded label on the test queries for which the
router chooses it, drawn with replacement. From some feedback on, right answers become wrong with equal probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from benchmarks.drift import delay, delay_figures, text
from prefill_router.cli import main
from prefill_router.config import FrozenModel
from prefill_router.drift.betting import mean_factors, wealth
from prefill_router.files import write_json
from prefill_router.locations import Location
from prefill_router.metrics.predictions import Predictions, read_predictions
from prefill_router.routing import policy

ROUTER = "prefill"
FALLS = (0.0, 0.1, 0.2)  # of the share of right answers


class FeedbackConfig(FrozenModel):
    """Predictions, and the streams."""

    predictions: Annotated[
        tuple[Location, ...], Field(min_length=1, description="predictions.parquet, a file or a list")
    ]
    output: Annotated[Location, Field(description="output folder")]
    streams: Annotated[int, Field(ge=1, description="streams per model and kind")] = 200
    length: Annotated[int, Field(ge=1, description="feedbacks of a stream")] = 3_000
    change: Annotated[int, Field(ge=0, description="feedbacks before the model becomes worse")] = 500
    tolerances: Annotated[tuple[float, ...], Field(min_length=1, description="tolerances of the alarm")] = (0.05, 0.02)
    least: Annotated[int, Field(ge=1, description="test queries for which a model is chosen, at least")] = 100
    alpha: Annotated[float, Field(gt=0, lt=1, description="false alarm rate of all models together")] = 0.01

    @field_validator("predictions", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value


def run(config: FeedbackConfig) -> str:
    """Measure the alarm on feedback; write OUTPUT/drift_feedback.json."""
    found = []
    for seed, path in enumerate(config.predictions):
        found.append(dict(measure(read_predictions(path), config, np.random.default_rng(seed))))
    written = config.output / "drift_feedback.json"
    write_json(written, {"config": config.model_dump(mode="json"), "predictions": found})
    print(text(found))
    return f"{sum(map(len, found))} models of {len(found)} evaluations; figures in {written}"


def measure(
    predictions: Predictions, config: FeedbackConfig, rng: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every model that is chosen often: accuracy and gap where it is chosen, and delays of the alarm `low`."""
    router = predictions.routers[ROUTER]
    p, lam, margin = router.p, router.chosen_lambda, predictions.margin(ROUTER)
    chosen = policy.choose(p, predictions.cost, predictions.cost_norm, lam, margin=margin)
    at = np.arange(len(p))
    confidence, correct = p[at, chosen], predictions.correct[at, chosen]
    for model, name in enumerate(predictions.models):
        rows = np.flatnonzero((chosen == model) & ~np.isnan(correct))
        if len(rows) < config.least:
            continue
        accuracy, figures = float(correct[rows].mean()), {}
        for fall in FALLS:
            for tolerance in config.tolerances:
                delays = []
                for _ in range(config.streams):
                    drawn = rng.choice(rows, config.length)
                    later = np.arange(config.length) >= config.change
                    spoilt = later & (rng.random(config.length) < fall / accuracy)
                    below = confidence[drawn] - np.where(spoilt, 0.0, correct[drawn])
                    alpha = config.alpha / len(predictions.models)
                    delays.append(delay(wealth(mean_factors(below - tolerance), alpha), config.change, alpha))
                figures[f"fall {fall:g}, tolerance {tolerance:g}"] = delay_figures(delays)
        gap = float((correct[rows] - confidence[rows]).mean())
        yield name, {"queries": len(rows), "accuracy": accuracy, "gap": gap, **figures}


if __name__ == "__main__":
    main(FeedbackConfig, run)
