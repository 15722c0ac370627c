"""Robustness: how often a perturbed prompt changes a router's decision, and the effect on accuracy and cost.

In: `Predictions` on the test split, and every router's confidences on perturbed prompts. Out: the figures below, per
router and perturbation, and pooled over the perturbations. Decisions are made at the router's chosen lambda. A
perturbed prompt keeps the labels, the estimated cost and the group of its source query: the right answer is the same,
and the price is assumed constant, so only a different decision changes the cost. Every figure follows from
predictions.parquet and perturbed.parquet. Knows nothing of how prompts are perturbed or encoded.

  flip_rate            share of perturbed prompts for which the router chooses another model
  accuracy_change      accuracy of the perturbed decisions minus that of the original ones, queries with complete labels
  cost_change          mean estimated cost of the perturbed decisions minus that of the original ones, USD per query
  confidence_shift     mean absolute change of p over the models
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from prefill_router.errors import InputError
from prefill_router.files import write_parquet
from prefill_router.locations import location, readable
from prefill_router.metrics.bootstrap import interval, resample
from prefill_router.metrics.confidences import ratio
from prefill_router.metrics.predictions import Predictions
from prefill_router.routing.policy import choose

ALL = "all"
SCHEMA = pa.schema(
    [
        ("router", pa.string()),
        ("query_id", pa.string()),
        ("perturbation", pa.string()),
        ("model", pa.string()),
        ("p", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Perturbed:
    """Every router's confidences on perturbed prompts, one row per source query and perturbation.

    `same_tokens`: per perturbation, the number of prompts that have the same tokens as the original. They have no rows.
    Raises InputError for arrays of different shapes, a p outside [0, 1], or a repeated (query, perturbation) pair.
    """

    query_ids: np.ndarray
    perturbations: np.ndarray
    models: tuple[str, ...]
    p: Mapping[str, Float[np.ndarray, "rows models"]]
    same_tokens: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = list(zip(self.query_ids, self.perturbations, strict=True))
        if not pairs or not self.p:
            raise InputError(f"perturbed: {len(pairs)} rows and {len(self.p)} routers; at least one of each is needed")
        if len(set(pairs)) < len(pairs):
            raise InputError("perturbed: a (query_id, perturbation) pair occurs twice; each must occur once")
        for name, p in self.p.items():
            if p.shape != (len(pairs), len(self.models)):
                raise InputError(
                    f"perturbed: p of router {name!r} has shape {p.shape}, expected (rows, models) = "
                    f"{(len(pairs), len(self.models))}"
                )
            if not ((p >= 0) & (p <= 1)).all():  # NaN fails this too
                raise InputError(f"perturbed: p of router {name!r}: allowed is a probability in [0, 1]")

    def __len__(self) -> int:
        return len(self.query_ids)


def robustness(
    predictions: Predictions, perturbed: Perturbed, *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """`{router: {perturbation: {"n", "n_complete", "n_same_tokens", FIGURE: {estimate, lower, upper}}}}`.

    The perturbation `all` pools the others. `n` counts perturbed prompts, `n_complete` those whose source query has a
    label for every model. Intervals come from a bootstrap over the groups of the source queries. Raises InputError if a
    source query or a router is not in the predictions, or if the models differ.
    """
    source = _sources(predictions, perturbed)
    names = dict.fromkeys([*perturbed.same_tokens, *perturbed.perturbations])
    parts = {name: perturbed.perturbations == name for name in names}
    parts[ALL] = np.ones(len(perturbed), dtype=bool)
    sums: dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]] = {}
    for router in perturbed.p:
        effects = _effects(predictions, perturbed, router, source)
        for name, rows in parts.items():
            for figure, values in effects.items():
                own = rows & ~np.isnan(values)
                sums[router, name, figure] = (
                    np.bincount(source[own], values[own], minlength=len(predictions)),
                    np.bincount(source[own], minlength=len(predictions)).astype(np.float64),
                )
    present = np.isin(np.arange(len(predictions)), source)
    totals, counts = (np.stack(columns, axis=1)[present] for columns in zip(*sums.values(), strict=True))

    def figures(weights: np.ndarray) -> dict[tuple[str, str, str], np.ndarray]:
        means = ratio(weights @ totals, weights @ counts)
        return {path: means[:, index] for index, path in enumerate(sums)}

    draws = resample(figures, predictions.groups[present], n_resamples, seed)
    complete = predictions.complete[source]
    report: dict[str, dict[str, Any]] = {
        router: {
            name: {
                "n": int(rows.sum()),
                "n_complete": int((rows & complete).sum()),
                "n_same_tokens": perturbed.same_tokens.get(name, 0)
                if name != ALL
                else sum(perturbed.same_tokens.values()),
            }
            for name, rows in parts.items()
        }
        for router in perturbed.p
    }
    for (router, name, figure), values in draws.items():
        reason = "no query has a label for every model" if parts[name].any() else "the encoder reads the same tokens"
        report[router][name][figure] = interval(values, reason).to_json()
    return report


def write_perturbed(perturbed: Perturbed, path: Path) -> None:
    """Writes perturbed.parquet atomically, one row per (router, row, model); `query_id` is that of the source query."""
    n_rows, n_models, n_routers = len(perturbed), len(perturbed.models), len(perturbed.p)

    def per_row(values: np.ndarray) -> np.ndarray:
        return np.tile(np.repeat(np.asarray(values, dtype=object), n_models), n_routers)

    columns = (
        np.repeat(np.asarray(list(perturbed.p), dtype=object), n_rows * n_models),
        per_row(perturbed.query_ids),
        per_row(perturbed.perturbations),
        np.tile(np.asarray(perturbed.models, dtype=object), n_rows * n_routers),
        np.concatenate([p.ravel() for p in perturbed.p.values()]).astype(np.float64),
    )
    write_parquet(path, pa.Table.from_arrays([pa.array(column) for column in columns], schema=SCHEMA))


def read_perturbed(path: Path | str) -> Perturbed:
    """Reads perturbed.parquet in any row order; the axes are in the order of first appearance.

    Raises InputError for an unreadable file, a missing column, or a missing or repeated (router, query, perturbation,
    model).
    """
    path = location(path)
    try:
        table = pq.read_table(readable(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of perturbed predictions") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise InputError(
            f"{path}: columns {', '.join(missing)} are missing; the file has {', '.join(table.column_names)}"
        )
    routers, models = (list(dict.fromkeys(table.column(name).to_pylist())) for name in ("router", "model"))
    rows = list(zip(*(table.column(name).to_pylist() for name in ("query_id", "perturbation")), strict=True))
    pairs = list(dict.fromkeys(rows))
    position = {pair: index for index, pair in enumerate(pairs)}
    shape = (len(routers), len(pairs), len(models))
    cell = np.ravel_multi_index(
        (
            [routers.index(name) for name in table.column("router").to_pylist()],
            [position[pair] for pair in rows],
            [models.index(name) for name in table.column("model").to_pylist()],
        ),
        shape,
    )
    if len(np.unique(cell)) != len(cell) or len(cell) != np.prod(shape):
        raise InputError(
            f"{path}: {len(cell):,} rows for {shape[0]} routers x {shape[1]:,} perturbed prompts x "
            f"{shape[2]} models; each must occur exactly once"
        )
    p = np.empty(shape)
    p.ravel()[cell] = table.column("p").to_numpy()
    query_ids, perturbations = (np.asarray(values, dtype=object) for values in zip(*pairs, strict=True))
    return Perturbed(query_ids, perturbations, tuple(models), dict(zip(routers, p, strict=True)))


def _sources(predictions: Predictions, perturbed: Perturbed) -> Int[np.ndarray, " rows"]:
    """Position of each row's source query in the test split."""
    if perturbed.models != predictions.models:
        raise InputError(
            f"perturbed: models are {', '.join(perturbed.models)}, but those of the predictions are "
            f"{', '.join(predictions.models)}; use the same checkpoint for both"
        )
    if strange := [name for name in perturbed.p if name not in predictions.routers]:
        raise InputError(
            f"perturbed: router {strange[0]!r} is not in the predictions; allowed are {', '.join(predictions.routers)}"
        )
    position = {query_id: index for index, query_id in enumerate(predictions.query_ids)}
    if unknown := [query_id for query_id in perturbed.query_ids if query_id not in position]:
        raise InputError(f"perturbed: source query {unknown[0]!r} is not in the predictions; perturb test queries only")
    return np.array([position[query_id] for query_id in perturbed.query_ids], dtype=np.int64)


def _effects(predictions: Predictions, perturbed: Perturbed, router: str, source: np.ndarray) -> dict[str, np.ndarray]:
    """Each figure's value per row, NaN for a row that does not count; the figure is the mean over the other rows."""
    cost, cost_norm, correct = predictions.cost[source], predictions.cost_norm[source], predictions.correct[source]
    original, lam = predictions.routers[router].p[source], predictions.routers[router].chosen_lambda
    at = np.arange(len(source))
    margin = predictions.margin(router)
    before, after = (choose(p, cost, cost_norm, lam, margin=margin) for p in (original, perturbed.p[router]))
    complete = predictions.complete[source]
    return {
        "flip_rate": (before != after).astype(np.float64),
        "accuracy_change": np.where(complete, correct[at, after] - correct[at, before], np.nan),
        "cost_change": cost[at, after] - cost[at, before],
        "confidence_shift": np.abs(perturbed.p[router] - original).mean(axis=1),
    }
