"""The searcher and the scheduler of a sweep: suggest, record and report trials.

Ray Tune requests configurations from `Recorder` and passes results to it. A trial has a file and a nested MLflow run as
soon as it starts. Both are identified by the trial's number, so that after `kill -9` the sweep resumes with the trials
that had not ended. Tune's own restore is not used: its snapshots are seconds old and lack the latest trials.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.result import TRAINING_ITERATION
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from prefill_router import registry
from prefill_router.routing.config import FitConfig
from prefill_router.sweeps.objective import LOWER_IS_BETTER, Objective
from prefill_router.sweeps.trials import Trial, best_trial, finite, load_trials, save_trial, varied
from tune.space import SearchSpace, suggest

FIGURES: tuple[Objective, ...] = ("auc", "brier", "p_auccc")
HEARTBEAT_S = 60


class Recorder(Searcher):
    """Suggests at most `total` trials and records them in `folder`. Trial 0 is `base`, the default configuration.

    Trials of an earlier run in `folder` count; those that had not ended run first. `fault` is the first exception in a
    callback, which Tune would discard; the sweep raises it at its end.
    """

    def __init__(
        self, folder: Path, space: SearchSpace, base: FitConfig, objective: Objective, total: int, concurrent: int
    ) -> None:
        super().__init__(metric=objective, mode="min" if objective in LOWER_IS_BETTER else "max")
        self.folder, self.space, self.base, self.objective = folder, space, base, objective
        self.total, self.concurrent = total, concurrent
        self.trials = {trial.number: trial for trial in load_trials(folder)}
        self.fault: Exception | None = None
        self._waiting = [number for number, trial in self.trials.items() if not trial.ended]
        self._numbers: dict[str, int] = {}
        self._runs: dict[int, registry.Run] = {}
        self._epochs: dict[int, dict[int, dict[str, float | None]]] = {}
        self._start_times: dict[int, float] = {}
        self._last_print, self._started = time.monotonic(), math.inf
        self._ended_before = sum(trial.ended for trial in self.trials.values())

    @property
    def left(self) -> int:
        """Number of trials still to run, including interrupted ones."""
        return max(self.total - len(self.trials), 0) + len(self._waiting)

    def suggest(self, trial_id: str) -> Any:
        """The next configuration, or `Searcher.FINISHED` if none is left."""
        if self.fault is not None:
            return Searcher.FINISHED
        try:
            number = self._waiting.pop(0) if self._waiting else self._new()
            if number is None:
                return Searcher.FINISHED
            trial = self.trials[number]
            run = registry.child(f"trial {number:04d}", f"trial {number:04d}", {"job": "trial", "trial": str(number)})
            run.log_params({"fit": trial.fit.model_dump(mode="json")})
        except Exception as error:  # noqa: BLE001 - Tune would discard it; the sweep raises it at its end
            self.fault = error
            return Searcher.FINISHED
        self._numbers[trial_id], self._runs[number], self._start_times[number] = number, run, time.monotonic()
        self._epochs[number] = {}
        self._started = min(self._started, self._start_times[number])
        return {"number": number, "fit": trial.fit.model_dump(mode="json")}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Records the figures of an epoch; prints the running trials if nothing was printed for HEARTBEAT_S seconds."""
        self._record(trial_id, result)
        if time.monotonic() - self._last_print > HEARTBEAT_S:
            running = ", ".join(
                f"trial {number} epoch {max(epochs)}, {_format_figures(epochs[max(epochs)])}"
                for number, epochs in self._epochs.items()
                if epochs
            )
            self._print(f"running: {running}")

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Records the end of a trial: its state, its figures, its run and its file."""
        if result:
            self._record(trial_id, result)
        number = self._numbers[trial_id]
        epochs = tuple(figures for _, figures in sorted(self._epochs.pop(number, {}).items()))
        state = "failed" if error or not result else "finished" if result.get("ended") else "stopped"
        trial = self.trials[number].model_copy(
            update={"state": state, "epochs": epochs, "seconds": round(time.monotonic() - self._start_times[number], 2)}
        )
        try:
            run = self._runs[number]
            run.log_history(epochs)
            run.tag(state=state)
            run.end("FAILED" if state == "failed" else "FINISHED")
            del self._runs[number]
            save_trial(self.folder, trial)  # last: a trial without this file runs again, in the same MLflow run
        except Exception as fault:  # noqa: BLE001 - as in `suggest`
            self.fault = fault
        self.trials[number] = trial
        self._print(self._summary(trial))

    def close(self) -> None:
        """Ends the MLflow runs of trials that did not end; `registry.child` reopens them."""
        for run in self._runs.values():
            run.end("KILLED")
        self._runs.clear()

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the state is in the folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, as `save`."""

    def _new(self) -> int | None:
        number = len(self.trials)
        if number >= self.total:
            return None
        ordered = [self.trials[known] for known in sorted(self.trials)]
        if number == 0:
            fit, parameters = self.base, self.space.parameters_of(self.base)
        else:
            found = suggest(self.space, ordered, self.objective, self.base, self.concurrent)
            if found is None:
                self._print("every configuration of the space has been tried")
                self.total = number
                return None
            fit, parameters = self.space.fit_config(found, self.base), found
        self.trials[number] = Trial(number=number, parameters=parameters, fit=fit)
        save_trial(self.folder, self.trials[number])
        return number

    def _record(self, trial_id: str, result: Mapping[str, Any]) -> None:
        figures = finite({name: result[name] for name in FIGURES if name in result})
        self._epochs[self._numbers[trial_id]][int(result[TRAINING_ITERATION])] = figures

    def _summary(self, trial: Trial) -> str:
        trials = list(self.trials.values())
        ended = sum(other.ended for other in trials)
        value, best = trial.value(self.objective), best_trial(trials, self.objective)
        parts = [
            f"{ended}/{self.total} trial {trial.number} {trial.state} after {len(trial.epochs)} epochs, "
            f"{trial.seconds:.0f} s"
        ]
        if value is not None:
            parts.append(f"{self.objective} {value:.4f}")
        if best is not None:
            parts.append(
                "best so far" if best is trial else f"best {best.value(self.objective):.4f} (trial {best.number})"
            )
        names = varied(trials) or trial.parameters
        parts.append(
            "the default configuration"
            if trial.number == 0
            else " ".join(f"{name}={_format_value(value)}" for name, value in trial.parameters.items() if name in names)
        )
        done, left = ended - self._ended_before, self.total - ended
        if done and left:
            parts.append(f"about {(time.monotonic() - self._started) / done * left / 60:.0f} min left")
        return "; ".join(parts)

    def _print(self, text: str) -> None:
        self._last_print = time.monotonic()
        print(text, flush=True)


class Halving(ASHAScheduler):
    """ASHA (Li et al. 2020) over epochs. Never stops the default configuration, and can replay earlier trials."""

    def remember(self, trials: Sequence[Trial], objective: Objective) -> None:
        """Replays trials that ended, so that the scheduler has the state that it had after them."""
        controller: Any = None  # not used by the scheduler
        for trial in trials:
            values = [epoch.get(objective) for epoch in trial.epochs]
            if trial.ended and values and None not in values:
                stand_in: Any = SimpleNamespace(trial_id=f"recorded {trial.number}", config={"number": trial.number})
                self.on_trial_add(controller, stand_in)
                for epoch, value in enumerate(values, 1):
                    result = {TRAINING_ITERATION: epoch, objective: value}
                    self.on_trial_result(controller, stand_in, result)
                self.on_trial_complete(controller, stand_in, result)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """ASHA's decision; always CONTINUE for trial 0."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config["number"] == 0 else decision


def _format_figures(figures: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)


def _format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
