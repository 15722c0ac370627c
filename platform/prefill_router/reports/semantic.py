"""The files of a grid of semantic routers: grid.json, grid.md, and an evaluation of the best configurations.

In: the folder of fits, and the list of fits in it. Out, under FOLDER: `grid.json`, `grid.md`, and `evaluation/` with
the files of a plain evaluation; its reference is the prefill router. Files of optional parts (split seeds,
leave-one-benchmark-out) are removed if the part is switched off. Does no fitting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefill_router.experiments import leave_one_out
from prefill_router.experiments.semantic_grid import HYBRID, Material, Task, load_result, predictions
from prefill_router.files import write_atomically, write_json
from prefill_router.metrics import seeds
from prefill_router.metrics.evaluate import REFERENCE, evaluate
from prefill_router.metrics.predictions import Predictions, write_predictions
from prefill_router.reports.evaluation import write_report
from prefill_router.reports.semantic_tables import (
    FIGURES,
    best_of,
    ends,
    grid_markdown,
    grid_rows,
    shown_rows,
    unseen_markdown,
)
from prefill_router.semantic.grid import Configuration, Result

CAVEAT = (
    "If activations of one encoder only are given, the encoder and the embedding model are the same model: the grid "
    "then compares layers and heads, not LLMs with embedding models."
)
Routers = Mapping[str, Configuration | None]  # by name; None is the prefill router


@dataclass(frozen=True)
class Fitted:
    """The fits of a run, in `folder`.

    `grid`: configurations fitted at seed 0. `routers`: fitted at every seed below `n_seeds`. `few`: those of `routers`
    that were also fitted without each of the `benchmarks`. `failed`: messages of the fits that failed.
    """

    folder: Path
    grid: Sequence[Configuration]
    routers: Routers
    n_seeds: int
    few: Routers
    benchmarks: Sequence[str]
    failed: Sequence[str]

    def results(self, routers: Routers, seed: int = 0, benchmark: str | None = None) -> dict[str, Result]:
        """Results by name; routers without a stored result are left out."""
        tasks = {name: Task(configuration=one, seed=seed, benchmark=benchmark) for name, one in routers.items()}
        found = {name: load_result(self.folder, task) for name, task in tasks.items()}
        return {name: result for name, result in found.items() if result is not None}


def write_grid(folder: Path, material: Material, fitted: Fitted, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Writes grid.json and grid.md, which begins with the tables `more`. Returns the rows of grid.json."""
    done = fitted.results({one.name: one for one in fitted.grid})
    references = {name: one for name, one in fitted.routers.items() if name in (REFERENCE, HYBRID)}
    metrics = evaluate(predictions(material, {**done, **fitted.results(references)}, 0), n_resamples=0)
    rows = grid_rows(fitted.grid, done, metrics)
    tables = grid_markdown(rows, {name: metrics["routers"][name] for name in references})
    text = "\n".join([f"{CAVEAT}\n", *more, tables])
    write_json(folder / "grid.json", {"configurations": rows, "failed": list(fitted.failed), "caveat": CAVEAT})
    write_atomically(folder / "grid.md", lambda place: place.write_text(text, encoding="utf-8"))
    return rows


def write_evaluation(
    folder: Path, material: Material, fitted: Fitted, provenance: Mapping[str, Any], n_resamples: int
) -> tuple[dict[str, float], str]:
    """Writes all files. Returns each router's mean AUC over the seeds, and the text of grid.md."""
    own = folder / "evaluation"
    by_seed = {
        seed: predictions(material, fitted.results(fitted.routers, seed), seed) for seed in range(fitted.n_seeds)
    }
    evaluated = {seed: evaluate(one, n_resamples=n_resamples, seed=seed) for seed, one in by_seed.items()}
    metrics, tables = evaluated[0], []
    for name in ("seeds.md", "leave_one_out.parquet"):  # left by a run with other options
        (own / name).unlink(missing_ok=True)
    if fitted.n_seeds > 1:
        metrics = metrics | {"seeds": seeds.across_seeds(evaluated)}
        table = seeds.markdown(metrics["seeds"], {(name,): heading for name, heading in FIGURES.items()})
        write_atomically(own / "seeds.md", lambda place: place.write_text(table, encoding="utf-8"))
        tables.append(f"Means over {fitted.n_seeds} split seeds:\n\n{table}")
    if fitted.benchmarks:
        unseen = _unseen(material, fitted, by_seed[0])
        write_predictions(unseen, own / "leave_one_out.parquet")
        metrics["leave_one_benchmark_out"] = evaluate(unseen, n_resamples=n_resamples, seed=0)
        tables.append(
            "Leave-one-benchmark-out, compared with training on all benchmarks, seed 0:\n\n"
            + unseen_markdown(metrics, metrics["leave_one_benchmark_out"])
        )
    rows = write_grid(folder, material, fitted, tables)
    write_predictions(by_seed[0], own / "predictions.parquet")
    write_json(own / "metrics.json", metrics)
    write_json(own / "provenance.json", {**provenance, "caveat": CAVEAT})
    top, bottom = ends(rows)
    write_report(
        own,
        by_seed[0],
        metrics,
        {**provenance, "caveat": CAVEAT},
        {
            "Grid": f"{len(rows)} configurations, ranked by AUC on the calibration queries. {CAVEAT}",
            "Best of each architecture": shown_rows(best_of(rows, "architecture")),
            "Best of each family": shown_rows(best_of(rows, "features")),
            "Highest and lowest P-AUCCC": shown_rows([*top, *bottom]),
        },
    )
    means = {
        name: sum(one["routers"][name]["auc"]["estimate"] for one in evaluated.values()) / len(evaluated)
        for name in fitted.routers
    }
    return means, (folder / "grid.md").read_text(encoding="utf-8")


def _unseen(material: Material, fitted: Fitted, seen: Predictions) -> Predictions:
    """Predictions for the test queries of seed 0, each by routers fitted without the query's benchmark."""
    inside = seen.take(np.isin(seen.benchmarks.astype(str), fitted.benchmarks))
    some = replace(inside, routers={name: inside.routers[name] for name in fitted.few})
    return leave_one_out.combine(
        some,
        {
            benchmark: predictions(material, fitted.results(fitted.few, 0, benchmark), 0, benchmark)
            for benchmark in fitted.benchmarks
        },
    )
