"""Compares the routers of several runs on their common test split, with paired differences.

In: output folders of jobs.evaluate. Out: the structure of metrics.json for the routers of all runs, named
`RUN: router`, with the runs, the reference and the leading run. Runs with different test sets are refused, because
their differences cannot be paired. Knows nothing of how the predictions were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import numpy as np

from prefill_router.errors import InputError
from prefill_router.files import sha256_file
from prefill_router.locations import location
from prefill_router.metrics.bootstrap import Json
from prefill_router.metrics.evaluate import REFERENCE, evaluate
from prefill_router.metrics.predictions import Predictions, RouterPredictions, read_predictions
from prefill_router.routing.policy import TrainingMeans

FILES = ("predictions.parquet", "metrics.json")
TOLERANCE = 1e-9  # relative, of costs: covers another order of summation
SAME_DATA = "train and evaluate both on the same outcomes, with the same fit.seed and fit.scheme"
SAME_POOL = "train and evaluate both with the same pool.yaml"
SAME_COSTS = (
    "the cost models differ, so the curves cannot be compared; train and evaluate both with the same "
    "pool.yaml and split, on outcomes that record input_tokens"
)


@dataclass(frozen=True)
class Run:
    """One evaluation. `name` is the shortest suffix of its path that is unique; `written` is the file's time."""

    name: str
    folder: Path
    written: datetime
    digest: str
    predictions: Predictions

    @property
    def main(self) -> str:
        """The main router of the run: the prefill router, or the first router if the run has none."""
        return REFERENCE if REFERENCE in self.predictions.routers else next(iter(self.predictions.routers))

    def label(self, router: str) -> str:
        return f"{self.name}: {router}"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads the predictions of each folder; queries and models get the order of the first run.

    If a run has costs of expected output tokens, all runs get the costs with median output lengths, which are common.
    Raises InputError for fewer than two folders, a repeated folder, a missing file, or test sets that differ.
    """
    if len(folders) < 2:
        raise InputError(
            f"runs: got {len(folders)}, a comparison takes two or more; give the output folders of jobs.evaluate"
        )
    paths = [location(folder).resolve() for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise InputError(
                f"runs: {folders[index]} and {folders[paths.index(path)]} are the same folder; give each run once"
            )
        if missing := [name for name in FILES if not (path / name).is_file()]:
            hint = (
                f"did you mean {folders[index]}/evaluation?"
                if (path / "evaluation" / missing[0]).is_file()
                else "give the output folder of a finished jobs.evaluate"
            )
            raise InputError(f"runs: {folders[index]} holds no {missing[0]}; {hint}")
    runs: list[Run] = []
    for name, path in zip(_short_names(paths), paths, strict=True):
        file = path / FILES[0]
        written = datetime.fromtimestamp(file.stat().st_mtime, UTC).replace(microsecond=0)
        runs.append(Run(name, path, written, sha256_file(file), read_predictions(file)))
    if any(run.predictions.medians is not None for run in runs):  # expected output tokens depend on the router
        runs = [replace(run, predictions=run.predictions.with_median_costs()) for run in runs]
    return [runs[0], *(replace(run, predictions=_aligned(runs[0], run)) for run in runs[1:])]


def merge(runs: Sequence[Run]) -> Predictions:
    """The test split with the routers of all runs. A router that is identical in all runs keeps its name, once."""
    routers: dict[str, RouterPredictions] = {}
    first = runs[0].predictions.routers
    once = [
        name
        for name in first
        if name not in {run.main for run in runs}
        and all(
            name in run.predictions.routers and _same(first[name], run.predictions.routers[name]) for run in runs[1:]
        )
    ]
    for run in runs:
        routers |= {run.label(name): router for name, router in run.predictions.routers.items() if name not in once}
    known = (run.predictions.training for run in runs)
    return replace(
        runs[0].predictions,
        routers=routers | {name: first[name] for name in once},
        training=next((training for training in known if training is not None), None),
    )


def compare(runs: Sequence[Run], *, n_resamples: int = 1000, seed: int = 0, reference: str | None = None) -> Json:
    """Every figure of every router, and `differences` from the reference, on the same resamples.

    `reference` is the name of a router, or of a run, which means its main router; default: the first run. `lead` holds
    the two main routers of highest AUC and the paired difference of their AUC; null if fewer than two have an AUC.
    Raises InputError for an unknown reference.
    """
    predictions = merge(runs)
    mains = {run.name: run.label(run.main) for run in runs}
    reference = mains.get(reference or runs[0].name, reference or "")
    if reference not in predictions.routers:
        raise InputError(
            f"reference: {reference!r} is none of the runs and routers; allowed are "
            f"{', '.join([*mains, *predictions.routers])}"
        )
    metrics = evaluate(predictions, n_resamples=n_resamples, seed=seed, reference=reference)
    auc = {name: metrics["routers"][label]["auc"]["estimate"] for name, label in mains.items()}
    ranked = sorted((name for name in mains if auc[name] is not None), key=lambda name: -auc[name])
    lead = None
    if len(ranked) > 1:
        first, second = ranked[:2]
        pair = {mains[name]: predictions.routers[mains[name]] for name in (first, second)}
        paired = (
            metrics
            if mains[second] == reference
            else evaluate(
                replace(predictions, routers=pair), n_resamples=n_resamples, seed=seed, reference=mains[second]
            )
        )
        lead = {"run": first, "over": second, "auc": paired["routers"][mains[first]]["differences"]["auc"]}
    return {
        "runs": {
            run.name: {
                "folder": str(run.folder),
                "written": run.written.isoformat(),
                "predictions_sha256": run.digest,
                "main": mains[run.name],
            }
            for run in runs
        },
        "reference": reference,
        "lead": lead,
        **metrics,
    }


def _aligned(first: Run, other: Run) -> Predictions:
    """The predictions of `other`, ordered as those of `first`. Raises InputError if the test sets differ."""
    ours, theirs = first.predictions, other.predictions

    def refuse(what: str, remedy: str) -> NoReturn:
        raise InputError(f"runs {first.name} and {other.name}: their test sets differ in {what}; {remedy}")

    for what, names, others, remedy in (
        ("queries", set(ours.query_ids), set(theirs.query_ids), SAME_DATA),
        ("models", set(ours.models), set(theirs.models), SAME_POOL),
    ):
        alone = {first.name: sorted(names - others), other.name: sorted(others - names)}
        if examples := [f"{len(only):,} in {run} alone, such as {only[0]!r}" for run, only in alone.items() if only]:
            refuse(f"{what}: {' and '.join(examples)}", remedy)
    place = {query_id: index for index, query_id in enumerate(theirs.query_ids)}
    theirs = take_models(theirs.take(np.array([place[query_id] for query_id in ours.query_ids])), ours.models)
    for what, a, b in (("benchmark", ours.benchmarks, theirs.benchmarks), ("group", ours.groups, theirs.groups)):
        if len(at := np.flatnonzero(a != b)):
            refuse(
                f"the {what} of {len(at):,} queries, such as {ours.query_ids[at[0]]!r}: {a[at[0]]!r} and {b[at[0]]!r}",
                SAME_DATA,
            )
    for what, a, b, remedy in (
        ("label", _labels(ours), _labels(theirs), SAME_DATA),
        ("est_cost_usd", ours.cost, theirs.cost, SAME_COSTS),
        ("cost_norm", ours.cost_norm, theirs.cost_norm, SAME_COSTS),
    ):
        if len(at := np.argwhere(~np.isclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * (what == "cost_norm")))):
            query, model = at[0]
            shown = ["unlabelled" if value < 0 else f"{value:g}" for value in (a[query, model], b[query, model])]
            refuse(
                f"the {what} of {len(at):,} pairs, such as ({ours.query_ids[query]!r}, {ours.models[model]!r}): "
                f"{' and '.join(shown)}",
                remedy,
            )
    if any(router.margin_bonus for run in (ours, theirs) for router in run.routers.values()):
        _same_training(ours, theirs, refuse)
    return theirs


def _same_training(ours: Predictions, theirs: Predictions, refuse: Callable[[str, str], NoReturn]) -> None:
    """Calls `refuse` if the training means, which the margins of routers depend on, differ."""
    if ours.training is None or theirs.training is None:
        return
    for a, b in zip(vars(ours.training).values(), vars(theirs.training).values(), strict=True):
        if not np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE):
            refuse("the training means, which determine the margin", SAME_DATA)


def _labels(predictions: Predictions) -> np.ndarray:
    """`correct` with -1 for a missing label: NaN does not compare equal."""
    return np.where(np.isnan(predictions.correct), -1, predictions.correct)


def take_models(predictions: Predictions, models: tuple[str, ...]) -> Predictions:
    """The predictions of `models`, in this order. Costs must have median output lengths."""
    order = [predictions.models.index(name) for name in models]
    routers = {name: replace(router, p=router.p[:, order]) for name, router in predictions.routers.items()}
    means = predictions.training
    return replace(
        predictions,
        models=models,
        correct=predictions.correct[:, order],
        cost=predictions.cost[:, order],
        cost_norm=predictions.cost_norm[:, order],
        routers=routers,
        training=means and TrainingMeans(means.accuracy[order], means.cost_norm[order]),
    )


def _same(a: RouterPredictions, b: RouterPredictions) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest unique suffix of each path, after the common suffix of all paths is removed."""
    parts = [path.parts for path in paths]
    while len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    ends = []
    for index, part in enumerate(parts):
        others = parts[:index] + parts[index + 1 :]
        length = next(
            n for n in range(1, len(part) + 1) if all(part[-n:] != other[-n:] for other in others) or n == len(part)
        )
        ends.append(str(Path(*part[-length:])))
    return ends
