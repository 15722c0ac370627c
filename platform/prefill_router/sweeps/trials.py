"""A sweep's trials on disk, one JSON file each, and what they say together: the best one, and which parameters matter.

In: a folder, written as trials begin and end. Out: `Trial`s in the order of their numbers. A trial is whole or not
there: whoever goes on with an interrupted sweep finds what ended, and what began and has to be run again. Knows nothing
of samplers, schedulers or tracking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from prefill_router.config import FrozenModel
from prefill_router.errors import InputError, one_line
from prefill_router.files import read_json, write_json
from prefill_router.routing.fit import FitConfig
from prefill_router.sweeps.objective import Objective, is_better

State = Literal["running", "finished", "stopped", "failed"]
Parameter = str | int | float | bool | None
N_TREES, N_SHUFFLES = 200, 10


class Trial(FrozenModel):
    """One configuration and how it went. `epochs` holds the held-out figures after each epoch, None where undefined.

    `finished` trained to its end, `stopped` was stopped early for being worse than others. `parameters` are the values
    that the sampler chose, empty for a configuration outside the space.
    """

    number: int
    parameters: dict[str, Parameter]
    fit: FitConfig
    state: State = "running"
    epochs: tuple[dict[str, float | None], ...] = ()
    seconds: float = 0.0

    def value(self, objective: Objective) -> float | None:
        """The figure after the last epoch."""
        return self.epochs[-1].get(objective) if self.epochs else None

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "stopped")


def save_trial(folder: Path, trial: Trial) -> None:
    """Writes FOLDER/0012.json atomically."""
    write_json(folder / f"{trial.number:04d}.json", trial.model_dump(mode="json"))


def load_trials(folder: Path) -> list[Trial]:
    """All trials by number; none where there is no folder. Raises InputError for a file that is no trial."""
    trials = []
    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            trials.append(Trial.model_validate(read_json(path)))
        except ValidationError as error:
            raise InputError(f"{path}: not a trial of this version: {one_line(error)}") from None
    return trials


def best_trial(trials: Sequence[Trial], objective: Objective) -> Trial | None:
    """The finished trial of the best figure, of equals the first; None where none finished."""
    best: Trial | None = None
    for trial in trials:
        value = trial.value(objective)
        if trial.state == "finished" and value is not None:
            so_far = best.value(objective) if best else None
            if so_far is None or is_better(objective, value, so_far):
                best = trial
    return best


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """The figures with None for what is undefined, as JSON needs."""
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def varied(trials: Sequence[Trial]) -> dict[str, list[Parameter]]:
    """The parameters that took more than one value, each with its values by trial (None where it did not apply).

    Trials outside the space, which have no parameters, are left out.
    """
    trials = [trial for trial in trials if trial.parameters]
    fullest = sorted(trials, key=lambda trial: -len(trial.parameters))  # it has them in the sampler's order
    names = list(dict.fromkeys(name for trial in fullest for name in trial.parameters))
    columns = {name: [trial.parameters.get(name) for trial in trials] for name in names}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def importance(trials: Sequence[Trial], objective: Objective) -> dict[str, float]:
    """Shares of importance, summing to 1, greatest first: how much worse a random forest over the parameters predicts
    the objective when a parameter's values are shuffled (Breiman 2001). Empty for fewer than eight trials that ended.

    Trials stopped early enter with the figure at which they stopped.
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
    """Numbers as they are, others by their place in alphabetical order; -1 where the parameter did not apply."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        return np.array([-1.0 if value is None else float(value) for value in values])
    places = {value: place for place, value in enumerate(sorted(set(known), key=str))}
    return np.array([-1.0 if value is None else float(places[value]) for value in values])
