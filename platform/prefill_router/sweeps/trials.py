"""Trials of a sweep on disk, one JSON file each; the best trial and the importance of parameters.

In: a folder with a file per trial, written when the trial starts and when it ends. Out: `Trial`s by number. Files are
written atomically: a resumed sweep finds the trials that ended and those that must be rerun. Knows nothing of samplers,
schedulers or tracking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, one_line
from prefill_router.files import read_json, write_json
from prefill_router.routing.config import FitConfig
from prefill_router.sweeps.objective import Objective, is_better

State = Literal["running", "finished", "stopped", "failed"]
Parameter = str | int | float | bool | None
N_TREES, N_SHUFFLES = 200, 10


class Trial(FrozenModel):
    """One configuration, its state and its held-out figures."""

    number: Annotated[int, Field(description="number of the trial, from 0")]
    parameters: Annotated[
        dict[str, Parameter], Field(description="values from the sampler; empty for a configuration outside the space")
    ]
    fit: Annotated[FitConfig, Field(description="the complete configuration")]
    state: Annotated[
        State, Field(description="finished: trained to the end; stopped: stopped early by the scheduler")
    ] = "running"
    epochs: Annotated[
        tuple[dict[str, float | None], ...],
        Field(description="held-out figures after each epoch; null if undefined"),
    ] = ()
    seconds: Annotated[float, Field(description="duration of the trial, seconds")] = 0.0

    def value(self, objective: Objective) -> float | None:
        """The figure after the last epoch; None before the first epoch or if undefined."""
        return self.epochs[-1].get(objective) if self.epochs else None

    @property
    def ended(self) -> bool:
        """Whether the trial has finished or was stopped early."""
        return self.state in ("finished", "stopped")


def save_trial(folder: Path, trial: Trial) -> None:
    """Writes the trial atomically to `folder`, for example as 0012.json."""
    write_json(folder / f"{trial.number:04d}.json", trial.model_dump(mode="json"))


def load_trials(folder: Path) -> list[Trial]:
    """All trials by number; empty if the folder does not exist. Raises InputError for a file that is not a trial."""
    trials = []
    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            trials.append(Trial.model_validate(read_json(path)))
        except ValidationError as error:
            raise InputError(
                f"{path}: not a trial of this version: {one_line(error)}; delete the file to drop the trial"
            ) from None
    return trials


def best_trial(trials: Sequence[Trial], objective: Objective) -> Trial | None:
    """The finished trial with the best figure; ties: the first. None if no trial has finished."""
    best: Trial | None = None
    for trial in trials:
        value = trial.value(objective)
        if trial.state == "finished" and value is not None:
            so_far = best.value(objective) if best else None
            if so_far is None or is_better(objective, value, so_far):
                best = trial
    return best


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """The figures with None instead of NaN and infinity, for JSON."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def varied(trials: Sequence[Trial]) -> dict[str, list[Parameter]]:
    """The parameters with more than one value, each with its values by trial (None if it did not apply).

    Trials without parameters (outside the space) are left out.
    """
    trials = [trial for trial in trials if trial.parameters]
    fullest = sorted(trials, key=lambda trial: -len(trial.parameters))  # has all parameters in the order of the sampler
    names = list(dict.fromkeys(name for trial in fullest for name in trial.parameters))
    columns = {name: [trial.parameters.get(name) for trial in trials] for name in names}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def importance(trials: Sequence[Trial], objective: Objective) -> dict[str, float]:
    """Permutation importance of the parameters in a random forest that predicts the objective (Breiman 2001).

    Shares that sum to 1, in descending order. Trials stopped early count with their last figure. Empty if fewer than
    eight trials have ended, or if no parameter matters.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    ended = [trial for trial in trials if trial.ended and trial.value(objective) is not None and trial.parameters]
    columns = varied(ended)
    if len(ended) < 8 or not columns:
        return {}
    x = np.column_stack([_codes(values) for values in columns.values()])
    y = np.array([trial.value(objective) for trial in ended], dtype=np.float64)
    forest = RandomForestRegressor(N_TREES, random_state=0).fit(x, y)
    shuffled: Any = permutation_importance(forest, x, y, n_repeats=N_SHUFFLES, random_state=0)
    shares = np.maximum(shuffled.importances_mean, 0)
    total = shares.sum()
    if total <= 0:
        return {}
    return {name: float(share) for share, name in sorted(zip(shares / total, columns, strict=True), reverse=True)}


def _codes(values: Sequence[Parameter]) -> np.ndarray:
    """Numbers unchanged, other values by alphabetical rank; -1 if the parameter did not apply."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        return np.array([-1.0 if value is None else float(value) for value in values])
    places = {value: place for place, value in enumerate(sorted(set(known), key=str))}
    return np.array([-1.0 if value is None else float(places[value]) for value in values])
