"""A trial for Ray Tune: one epoch per step, on arrays in the object store that the trials of a node share.

The next trial reuses the actor. Reads no files. `sweeps.prepare.run_trial` does the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray import tune

from prefill_router.routing.config import FitConfig
from prefill_router.sweeps.objective import objectives
from prefill_router.sweeps.prepare import HeldOut, Prepared, run_trial


class SweepTrial(tune.Trainable):
    """A trial. `config` holds the trial's `number` and `fit`, the fields of a FitConfig."""

    def setup(self, config: dict[str, Any], prepared: Prepared) -> None:  # type: ignore[override]
        self.prepared = prepared
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.fit = FitConfig.model_validate(new_config["fit"])
        self.epochs: Iterator[HeldOut] = run_trial(self.prepared, self.fit)
        return True

    def step(self) -> dict[str, Any]:
        """Trains one epoch and returns the held-out figures; `ended` and `done` are true after the last epoch."""
        held_out = next(self.epochs)
        correct = self.prepared.correct[self.prepared.held_out]
        figures = objectives(held_out.p, correct, *self.prepared.costs_of(self.fit))
        return {**figures, "ended": held_out.last, "done": held_out.last}
