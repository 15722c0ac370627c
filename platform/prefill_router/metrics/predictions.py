"""The input of an evaluation: every router's confidences on the test split, with labels and estimated costs.

In: arrays [queries models] (test split, models in pool order), or predictions.parquet. Out: `Predictions`, which
determines every figure of metrics.json. `correct` is 0, 1 or NaN (unlabelled), `cost` is in USD per query
(docs/equations.md, Eq. 2), `cost_norm` is that cost normalised on the training split (Eq. 3), `p` is a probability.
Knows nothing of how a router computes its confidences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from prefill_router.errors import InputError
from prefill_router.files import write_atomically
from prefill_router.locations import location, readable
from prefill_router.routing.policy import Margin, TrainingMeans

SCHEMA = pa.schema(
    [
        ("router", pa.string()),
        ("query_id", pa.string()),
        ("benchmark", pa.string()),
        ("group", pa.string()),
        ("model", pa.string()),
        ("p", pa.float64()),
        ("est_cost_usd", pa.float64()),
        ("cost_norm", pa.float64()),
        ("correct", pa.int8()),
        ("chosen_lambda", pa.float64()),
        ("overhead_usd", pa.float64()),
        ("train_accuracy", pa.float64()),
        ("train_cost_norm", pa.float64()),
        ("margin_bonus", pa.float64()),
        ("median_cost_usd", pa.float64()),
        ("median_cost_norm", pa.float64()),
        ("train_median_cost_norm", pa.float64()),
    ]
)
LATER_COLUMNS = {  # absent from older files, with their values there
    "overhead_usd": 0.0,
    "train_accuracy": np.nan,
    "train_cost_norm": np.nan,
    "margin_bonus": 0.0,
    **dict.fromkeys(("median_cost_usd", "median_cost_norm", "train_median_cost_norm"), np.nan),
}


@dataclass(frozen=True)
class RouterPredictions:
    """One router: its confidences, and its lambda, which is chosen without the test split.

    `overhead_usd` is the cost of one routing decision in USD per query (encoder time); 0 leaves it out. `margin_bonus`
    is the bonus of its `Margin`; 0: no margin.
    """

    p: Float[np.ndarray, "queries models"]
    chosen_lambda: float
    overhead_usd: float = 0.0
    margin_bonus: float = 0.0


@dataclass(frozen=True)
class MedianCosts:
    """Costs with the models' median output lengths. They are the same for all routers of one split.

    `cost` is in USD; `train_cost_norm` is the mean normalised cost of each model on the training queries.
    """

    cost: Float[np.ndarray, "queries models"]
    cost_norm: Float[np.ndarray, "queries models"]
    train_cost_norm: Float[np.ndarray, " models"]

    def take(self, queries: np.ndarray) -> MedianCosts:
        """A subset of the queries, by position or mask."""
        return MedianCosts(self.cost[queries], self.cost_norm[queries], self.train_cost_norm)


@dataclass(frozen=True)
class Predictions:
    """The test split and the confidences of each router. Arrays are float64, so a file round trip is exact.

    `training` determines the best static choice; without it, figures that compare with that choice are left out.
    `medians` are the costs with median output lengths; None: `cost` has these.
    Raises InputError for a value out of range, a repeated query or model, or arrays of different shapes.
    """

    query_ids: np.ndarray
    benchmarks: np.ndarray
    groups: np.ndarray
    models: tuple[str, ...]
    correct: Float[np.ndarray, "queries models"]
    cost: Float[np.ndarray, "queries models"]
    cost_norm: Float[np.ndarray, "queries models"]
    routers: dict[str, RouterPredictions]
    training: TrainingMeans | None = None
    medians: MedianCosts | None = None

    def __post_init__(self) -> None:
        for name in ("query_ids", "benchmarks", "groups"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=object))
        for name in ("correct", "cost", "cost_norm"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        object.__setattr__(
            self,
            "routers",
            {
                name: RouterPredictions(
                    np.asarray(router.p, dtype=np.float64),
                    float(router.chosen_lambda),
                    float(router.overhead_usd),
                    float(router.margin_bonus),
                )
                for name, router in self.routers.items()
            },
        )
        self._check()

    def _check(self) -> None:
        shape = (len(self.query_ids), len(self.models))
        if 0 in shape or not self.routers:
            raise InputError(
                f"predictions: {shape[0]} queries, {shape[1]} models and {len(self.routers)} routers; "
                "at least one of each is needed"
            )
        if len(set(self.query_ids)) < shape[0] or len(set(self.models)) < shape[1]:
            raise InputError("predictions: a query_id or a model occurs twice; each must occur once")
        _check_array(
            "correct", self.correct, shape, np.isnan(self.correct) | np.isin(self.correct, (0, 1)), "0, 1 or NaN"
        )
        _check_array("cost", self.cost, shape, np.isfinite(self.cost) & (self.cost >= 0), "a finite cost of at least 0")
        _check_array(
            "cost_norm", self.cost_norm, shape, (self.cost_norm >= 0) & (self.cost_norm <= 1), "a number in [0, 1]"
        )
        for name, router in self.routers.items():
            _check_array(
                f"p of router {name!r}", router.p, shape, (router.p >= 0) & (router.p <= 1), "a probability in [0, 1]"
            )
            if not 0 <= router.chosen_lambda <= 1:
                raise InputError(
                    f"predictions: chosen_lambda of router {name!r}: got {router.chosen_lambda}, "
                    "allowed is a number in [0, 1]"
                )
            if not (np.isfinite(router.overhead_usd) and router.overhead_usd >= 0):
                raise InputError(
                    f"predictions: overhead_usd of router {name!r}: got {router.overhead_usd}, allowed is "
                    "a finite cost of at least 0, in USD per query"
                )
            if not 0 <= router.margin_bonus <= 1 or (router.margin_bonus and self.training is None):
                raise InputError(
                    f"predictions: margin_bonus of router {name!r}: got {router.margin_bonus}, allowed is a number in "
                    "[0, 1], and 0 without training means"
                )
        if self.training is not None:
            for name, values in vars(self.training).items():
                if values.shape != shape[1:] or not ((values >= 0) & (values <= 1)).all():
                    raise InputError(
                        f"predictions: training {name}: got {values.tolist()} for {shape[1]} models, allowed is one "
                        "number in [0, 1] per model"
                    )

    def take(self, queries: np.ndarray) -> Predictions:
        """A subset of the queries, by position or mask."""
        return Predictions(
            self.query_ids[queries],
            self.benchmarks[queries],
            self.groups[queries],
            self.models,
            self.correct[queries],
            self.cost[queries],
            self.cost_norm[queries],
            {name: replace(router, p=router.p[queries]) for name, router in self.routers.items()},
            self.training,
            None if self.medians is None else self.medians.take(queries),
        )

    def with_median_costs(self) -> Predictions:
        """The same predictions with the costs in `medians`."""
        if self.medians is None:
            return self
        training = self.training and replace(self.training, cost_norm=self.medians.train_cost_norm)
        return replace(self, cost=self.medians.cost, cost_norm=self.medians.cost_norm, training=training, medians=None)

    def margin(self, router: str) -> Margin | None:
        """The margin of a router for the best static choice; None if it has none."""
        bonus = self.routers[router].margin_bonus
        return Margin(self.training, bonus) if bonus and self.training is not None else None

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def complete(self) -> Bool[np.ndarray, " queries"]:
        """Queries with a label for every model. The accuracy-cost curve uses only these."""
        return ~np.isnan(self.correct).any(axis=1)


def with_overhead(
    predictions: Predictions, usd_per_query: float, without: Sequence[str] = ("category_prior", "best_single")
) -> Predictions:
    """The same predictions with `usd_per_query` as every router's overhead; routers in `without` have none."""
    return replace(
        predictions,
        routers={
            name: replace(router, overhead_usd=0.0 if name in without else usd_per_query)
            for name, router in predictions.routers.items()
        },
    )


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Writes predictions.parquet atomically, one row per (router, query, model), in the order of `predictions`."""
    n_queries, n_models, n_routers = len(predictions), len(predictions.models), len(predictions.routers)

    def per_query(values: np.ndarray) -> np.ndarray:
        return np.tile(np.repeat(values, n_models), n_routers)

    def per_pair(values: np.ndarray) -> np.ndarray:
        return np.tile(values.ravel(), n_routers)

    correct = per_pair(predictions.correct)
    nothing = np.full((n_queries, n_models), np.nan)
    means = predictions.training or TrainingMeans(nothing[0], nothing[0])
    medians = predictions.medians or MedianCosts(nothing, nothing, nothing[0])

    def per_model(values: np.ndarray) -> np.ndarray:
        return np.tile(values, n_queries * n_routers)

    def per_router(name: str) -> np.ndarray:
        return np.repeat([getattr(router, name) for router in predictions.routers.values()], n_queries * n_models)

    columns = {
        "router": np.repeat(np.asarray(list(predictions.routers), dtype=object), n_queries * n_models),
        "query_id": per_query(predictions.query_ids),
        "benchmark": per_query(predictions.benchmarks),
        "group": per_query(predictions.groups),
        "model": np.tile(np.asarray(predictions.models, dtype=object), n_queries * n_routers),
        "p": np.concatenate([router.p.ravel() for router in predictions.routers.values()]),
        "est_cost_usd": per_pair(predictions.cost),
        "cost_norm": per_pair(predictions.cost_norm),
        "correct": pa.array(np.nan_to_num(correct).astype(np.int8), mask=np.isnan(correct)),
        "chosen_lambda": per_router("chosen_lambda"),
        "overhead_usd": per_router("overhead_usd"),
        "train_accuracy": per_model(means.accuracy),
        "train_cost_norm": per_model(means.cost_norm),
        "margin_bonus": per_router("margin_bonus"),
        "median_cost_usd": per_pair(medians.cost),
        "median_cost_norm": per_pair(medians.cost_norm),
        "train_median_cost_norm": per_model(medians.train_cost_norm),
    }
    table = pa.table({name: pa.array(column, from_pandas=True) for name, column in columns.items()}, schema=SCHEMA)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_predictions(path: Path | str) -> Predictions:
    """Reads predictions.parquet in any row order; the axes are in the order of first appearance.

    Raises InputError for an unreadable file, a missing column, a missing or repeated (router, query, model), or a
    label, cost or normalised cost that differs between routers.
    """
    path = location(path)
    try:
        table = pq.read_table(readable(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such predictions file; give the predictions.parquet of an evaluation") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    for name, value in LATER_COLUMNS.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array(np.full(len(table), value), from_pandas=True))
    if "chat" in table.column_names:  # the column's name before format 2
        table = table.rename_columns(["cost_norm" if name == "chat" else name for name in table.column_names])
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path}: columns {', '.join(missing)} are missing; the file has {', '.join(table.column_names)}"
        )
    router, routers = _codes(table, "router")
    query, query_ids = _codes(table, "query_id")
    model, models = _codes(table, "model")
    shape = (len(routers), len(query_ids), len(models))
    cell = np.ravel_multi_index((router, query, model), shape)
    if len(np.unique(cell)) != len(cell) or len(cell) != np.prod(shape):
        raise InputError(
            f"{path}: {len(cell):,} rows for {shape[0]} routers x {shape[1]:,} queries x {shape[2]} "
            "models; each triple must occur exactly once"
        )

    def cube(name: str) -> np.ndarray:
        values = np.empty(shape)
        values.ravel()[cell] = table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
        return values

    def shared(name: str) -> np.ndarray:
        values = cube(name)
        if not np.array_equal(values, np.broadcast_to(values[0], shape), equal_nan=True):
            raise InputError(f"{path}: column {name!r} differs between routers; it belongs to the (query, model) pair")
        return values[0]

    def strings(name: str) -> np.ndarray:
        values = np.empty(shape[1], dtype=object)
        values[query] = table.column(name).to_pylist()
        return values

    p, of_router = cube("p"), [cube(name)[:, 0, 0] for name in ("chosen_lambda", "overhead_usd", "margin_bonus")]
    accuracy, cost_norm = shared("train_accuracy")[0], shared("train_cost_norm")[0]
    medians = MedianCosts(shared("median_cost_usd"), shared("median_cost_norm"), shared("train_median_cost_norm")[0])
    return Predictions(
        np.asarray(query_ids, dtype=object),
        strings("benchmark"),
        strings("group"),
        tuple(models),
        shared("correct"),
        shared("est_cost_usd"),
        shared("cost_norm"),
        {
            name: RouterPredictions(p[index], *(float(values[index]) for values in of_router))
            for index, name in enumerate(routers)
        },
        None if np.isnan(accuracy).all() else TrainingMeans(accuracy, cost_norm),
        None if np.isnan(medians.cost).all() else medians,
    )


def _check_array(name: str, values: np.ndarray, shape: tuple[int, int], good: np.ndarray, allowed: str) -> None:
    if values.shape != shape:
        raise InputError(f"predictions: {name} has shape {values.shape}, expected (queries, models) = {shape}")
    if not good.all():
        query, model = np.argwhere(~good)[0]
        raise InputError(
            f"predictions: {name}, query {query}, model {model}: got {values[query, model]}, allowed is {allowed}"
        )


def _codes(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    column = table.column(name).cast(pa.string()).combine_chunks().dictionary_encode()
    return column.indices.to_numpy(zero_copy_only=False), column.dictionary.to_pylist()
