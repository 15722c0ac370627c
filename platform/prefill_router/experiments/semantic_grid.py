"""Comparison of semantic routers with the prefill router: fits, their result files and joint predictions.

In: a `Task` (a configuration, a split seed and, optionally, a benchmark to leave out) and the `Material` that tasks
share. Out: a `Result` per task, saved to a file of its own, so that an interrupted run can resume; `Predictions` of
several results. A task without a configuration fits the prefill router. All tasks of a seed use the same 75/10/15
split. Does not handle processes; reports/semantic_tables.py makes the tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from prefill_router.config import FrozenModel
from prefill_router.experiments.leave_one_out import without
from prefill_router.files import sha256_strings, write_atomically
from prefill_router.locations import local_copy
from prefill_router.metrics.predictions import Predictions, RouterPredictions
from prefill_router.outcomes.splits import Scheme, Split, make_folds, split_queries
from prefill_router.pool import Pool
from prefill_router.routing.config import FitConfig
from prefill_router.routing.cost import fit_costs
from prefill_router.routing.fit import VALIDATION_FOLDS, FittedRouter, best_lambda, fit_router, held_out_figures
from prefill_router.routing.layers import N_FOLDS
from prefill_router.routing.policy import Margin, training_means
from prefill_router.routing.trunk import TrunkConfig
from prefill_router.semantic.calibrators import Suite
from prefill_router.semantic.families import Sources
from prefill_router.semantic.grid import Configuration, Result, fit_configuration
from prefill_router.signals.join import Signals

FITS_VERSION = 2  # raise it whenever the same task gives another result
SCHEME: Scheme = "75/10/15"
HYBRID = "hybrid"
PLAIN: dict[str, Any] = {"stack": (), "margin": False, "lengths": "median"}  # of fits whose features alone are used


@dataclass(frozen=True)
class Material:
    """Inputs that all tasks share. `fit`: the prefill router's configuration; tasks replace its seed and scheme."""

    pool: Pool
    signals: Signals
    sources: Sources
    fit: FitConfig


class Task(FrozenModel):
    """One fit: a configuration or, if None, the prefill router. `benchmark`: left out of training unless None."""

    configuration: Configuration | None
    seed: int
    benchmark: str | None = None

    def path(self, folder: Path) -> Path:
        """The file of its result. The name changes with FITS_VERSION and with the settings, defaults included."""
        made = self.configuration.make().settings if self.configuration else None
        key = json.dumps(
            [
                FITS_VERSION,
                self.configuration
                and [self.configuration.router, self.configuration.family]
                + ([] if self.configuration.encoder is None else [self.configuration.encoder]),
                made,
                self.seed,
                self.benchmark,
            ],
            sort_keys=True,
        )
        return folder / f"{sha256_strings([key])[:16]}.safetensors"


def hybrid(configuration: Configuration, trunk: TrunkConfig) -> Configuration:
    """A network with the settings of `trunk`, over the prefill features and those of `configuration`."""
    parts = [part for part in configuration.family.split("+") if part != "prefill"]
    return Configuration(
        family="+".join(["prefill", *parts]),
        router="network",
        settings={"joint": True, "difficulty": 0.0, **trunk.model_dump(mode="json")},
        encoder=configuration.encoder,
    )


def split_of(material: Material, task: Task) -> Split:
    """The task's training, calibration and test queries."""
    outcomes = material.signals.outcomes
    split = split_queries(outcomes, task.seed, SCHEME)
    return split if task.benchmark is None else without(split, outcomes.benchmarks, task.benchmark)


def check_split(material: Material, task: Task) -> None:
    """Raises InputError if the task has too few queries for its folds; fits nothing."""
    split, outcomes = split_of(material, task), material.signals.outcomes
    make_folds(outcomes, split.train, task.seed + 1, VALIDATION_FOLDS)
    make_folds(outcomes, split.calibration, task.seed, N_FOLDS)


def run_task(material: Material, task: Task) -> Result:
    """Fits the task. Raises InputError as `fit_configuration` and `fit_router`."""
    split, signals = split_of(material, task), material.signals
    if task.configuration is None:
        began = time.process_time()
        fitted = _fit_prefill(material, split, task.seed, material.fit)
        features = fitted.router.features(signals.states)
        p_test, _ = fitted.router.confidences(features[split.test])
        rows, name, margin = split.calibration, material.fit.calibrator, fitted.router.margin
        raw, correct = fitted.router.ensemble.probabilities(features)[rows], signals.outcomes.correct[rows]
        held_out = fitted.held_out_p[rows]
        figures: dict[Suite, dict[str, float]] = {"none": _figures(raw, correct), name: _figures(held_out, correct)}
        if fitted.router.stack is not None:
            figures["none"] = figures[name]
        bonus = 0.0 if margin is None else margin.bonus
        return Result(name, figures, held_out, p_test, time.process_time() - began, bonus)
    prefill = None
    if "prefill" in task.configuration.family.split("+"):
        # Only layers and projections are used, so the trunk is as small as possible.
        trunk = TrunkConfig(widths=(1,), members=1, kept=1, max_epochs=1)
        router = _fit_prefill(
            material, split, task.seed, material.fit.model_copy(update=PLAIN | {"trunk": trunk})
        ).router
        prefill = router.features(signals.states)
    return fit_configuration(task.configuration, material.sources, signals.outcomes, split, task.seed, prefill)


def save_result(folder: Path, task: Task, result: Result) -> None:
    """Writes the task's file atomically."""
    about = {
        "task": task.model_dump_json(),
        "calibrator": result.calibrator,
        "seconds": repr(result.seconds),
        "figures": json.dumps(result.figures),
        "margin_bonus": repr(result.margin_bonus),
    }
    arrays = {"p_calibration": result.p_calibration, "p_test": result.p_test}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        task.path(folder),
        lambda place: save_file(
            {name: np.ascontiguousarray(array, dtype=np.float64) for name, array in arrays.items()}, place, about
        ),
    )


def load_result(folder: Path, task: Task) -> Result | None:
    """The task's saved result; None if there is no file."""
    path = task.path(folder)
    if not path.exists():
        return None
    with local_copy(path) as copy, safe_open(copy, framework="numpy") as file:
        about = file.metadata()
        return Result(
            about["calibrator"],
            json.loads(about["figures"]),
            file.get_tensor("p_calibration"),
            file.get_tensor("p_test"),
            float(about["seconds"]),
            float(about.get("margin_bonus", 0)),
        )


def predictions(
    material: Material, results: Mapping[str, Result], seed: int, benchmark: str | None = None
) -> Predictions:
    """`Predictions` of the routers in `results`, by name, on the test split of `seed`.

    All results must be of that split. Costs are estimates by Eq. 2 of docs/equations.md with the token counts of the
    first encoder. Each router's lambda is the best on the calibration queries.
    """
    task = Task(configuration=None, seed=seed, benchmark=benchmark)
    split, outcomes = split_of(material, task), material.signals.outcomes
    n_tokens = next(iter(material.signals.n_tokens.values()))
    costs = fit_costs(material.pool, outcomes, split.train, n_tokens)
    known = costs.estimate(
        n_tokens[split.train], outcomes.input_tokens[split.train], outcomes.prompt_bytes[split.train]
    )
    means = training_means(outcomes.correct[split.train], costs.normalise(known))
    routers = {}
    for name, result in results.items():
        held_out = np.full(outcomes.correct.shape, np.nan)
        held_out[split.calibration] = result.p_calibration
        margin = Margin(means, result.margin_bonus)
        lam = best_lambda(held_out, outcomes, split.calibration, costs, n_tokens, margin)
        routers[name] = RouterPredictions(result.p_test, lam, margin_bonus=result.margin_bonus)
    test = split.test
    cost = costs.estimate(n_tokens[test], outcomes.input_tokens[test], outcomes.prompt_bytes[test])
    return Predictions(
        outcomes.query_ids[test],
        outcomes.benchmarks[test],
        outcomes.groups[test],
        outcomes.models,
        outcomes.correct[test],
        cost,
        costs.normalise(cost),
        routers,
        means,
    )


def best_configurations(grid: Sequence[Configuration], results: Mapping[str, Result], n: int) -> list[Configuration]:
    """The `n` configurations with a result and the highest calibration AUC; ties keep the order of the grid."""
    available = [configuration for configuration in grid if configuration.name in results]
    return sorted(available, key=lambda configuration: -results[configuration.name].auc)[:n]


def _figures(p: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    return {name.removeprefix("held_out_"): value for name, value in held_out_figures(p, correct).items()}


def _fit_prefill(material: Material, split: Split, seed: int, fit: FitConfig) -> FittedRouter:
    signals = material.signals
    return fit_router(signals, material.pool, split, fit.model_copy(update={"seed": seed, "scheme": SCHEME}), {})
