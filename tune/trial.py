"""A trial as Ray Tune runs it: an epoch a step, on arrays that all trials of a node share.

The actor is used again by the next trial. Nothing is read from disk here; the training is `routing.search.run_trial`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray import tune

from prefill_router.routing.fit import FitConfig
from prefill_router.sweeps.objective import objectives
from prefill_router.sweeps.prepare import HeldOut, Prepared, run_trial


class SweepTrial(tune.Trainable):
    """`config`: the trial's `number`, and `fit`, a FitConfig as a mapping."""

    def setup(self, config: dict[str, Any], prepared: Prepared) -> None:  # type: ignore[override]
        self.prepared = prepared
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.fit = FitConfig.model_validate(new_config["fit"])
        self.epochs: Iterator[HeldOut] = run_trial(self.prepared, self.fit)
        return True

    def step(self) -> dict[str, Any]:
        """Held-out figures after one more epoch; `done` after the last."""
        held_out = next(self.epochs)
        correct = self.prepared.correct[self.prepared.held_out]
        figures = objectives(held_out.p, correct, *self.prepared.costs_of(self.fit))
        return {**figures, "ended": held_out.last, "done": held_out.last}
