"""What a check of labels returns: counts with intervals, tables, a matrix to draw, and a row per suspicious label.

Knows nothing of the checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from prefill_router.outcomes.quality.table import LabelTable

Json = dict[str, Any]
Z = 1.959964  # of a 95 % interval
MIN_QUERIES = 50  # shares of fewer labels are too uncertain to be reported as suspicious
CLEAR_Z, CLEAR_DIFFERENCE = 4.0, 0.05  # of a model's rate that differs clearly from that of the others
SCHEMA = pa.schema(
    [
        ("reason", pa.string()),
        ("benchmark", pa.string()),
        ("query_id", pa.string()),
        ("other_query_id", pa.string()),
        ("model", pa.string()),
        ("correct", pa.float32()),
        ("score", pa.float64()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Share:
    """`count` of `of`, with the 95 % Wilson interval of the share (Wilson 1927). All None if `of` is 0."""

    count: int
    of: int

    @property
    def estimate(self) -> float | None:
        return self.count / self.of if self.of else None

    @property
    def lower(self) -> float | None:
        return max(0.0, self._centre - self._half) if self.of else None

    @property
    def upper(self) -> float | None:
        return min(1.0, self._centre + self._half) if self.of else None

    @property
    def _centre(self) -> float:
        return (self.count + Z * Z / 2) / (self.of + Z * Z)

    @property
    def _half(self) -> float:
        return Z / (self.of + Z * Z) * float(np.sqrt(self.count * (self.of - self.count) / self.of + Z * Z / 4))

    def to_json(self) -> Json:
        """`{count, of, estimate, lower, upper}`."""
        return {name: getattr(self, name) for name in ("count", "of", "estimate", "lower", "upper")}


@dataclass(frozen=True)
class Table:
    """A table of a finding. Cells are texts, counts (int), numbers (float), `Share`s, or None for undefined.

    `fractions` are the columns whose numbers are fractions, to be shown in per cent.
    """

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    fractions: tuple[str, ...] = ()

    def to_json(self) -> list[Json]:
        """A mapping of column to value for each row."""
        return [
            {
                name: value.to_json() if isinstance(value, Share) else value
                for name, value in zip(self.columns, row, strict=True)
            }
            for row in self.rows
        ]


@dataclass(frozen=True)
class Matrix:
    """Values by model and benchmark, or by model and model; NaN is undefined."""

    values: Float[np.ndarray, "rows columns"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    `share` counts what is suspicious in `unit`s; None: not checked, and `needs` says what the table lacks. `suspects`
    has the columns SCHEMA. `figures` are single numbers by name.
    """

    name: str
    unit: str
    share: Share | None
    needs: str = ""
    by_model: Mapping[str, Share] = field(default_factory=dict)
    by_benchmark: Mapping[str, Share] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    matrix: Matrix | None = None
    suspects: pa.Table = field(default_factory=SCHEMA.empty_table)

    @property
    def status(self) -> str:
        """`found`, `none`, or `not checked`."""
        return "not checked" if self.share is None else "found" if self.share.count else "none"

    def to_json(self) -> Json:
        """Every figure except the suspects, whose number is `suspects`."""
        shares = {
            name: {key: share.to_json() for key, share in getattr(self, name).items()}
            for name in ("by_model", "by_benchmark")
        }
        return {
            "status": self.status,
            "unit": self.unit,
            "share": None if self.share is None else self.share.to_json(),
            "needs": self.needs or None,
            "figures": dict(self.figures),
            **shares,
            "tables": {table.heading: table.to_json() for table in self.tables},
            "suspects": self.suspects.num_rows,
        }


def suspects(
    labels: LabelTable,
    reason: str,
    queries: Int[np.ndarray, " rows"],
    models: Int[np.ndarray, " rows"] | None = None,
    others: Int[np.ndarray, " rows"] | None = None,
    score: Float[np.ndarray, " rows"] | None = None,
    detail: str | Sequence[str] = "",
) -> pa.Table:
    """Rows of suspects.parquet: a query, a (query, model), or a pair of queries each. Arguments are positions."""
    outcomes, n = labels.outcomes, len(queries)
    correct = np.full(n, np.nan, dtype=np.float32) if models is None else outcomes.shares[queries, models]
    texts = [detail] * n if isinstance(detail, str) else list(detail)
    values = [
        pa.array([reason] * n, pa.string()),
        pa.array(outcomes.benchmarks[queries], pa.string()),
        pa.array(outcomes.query_ids[queries], pa.string()),
        pa.nulls(n, pa.string()) if others is None else pa.array(outcomes.query_ids[others], pa.string()),
        pa.nulls(n, pa.string())
        if models is None
        else pa.array(np.array(labels.models, dtype=object)[models], pa.string()),
        pa.array(correct, pa.float32(), from_pandas=True),
        pa.nulls(n, pa.float64()) if score is None else pa.array(score, pa.float64(), from_pandas=True),
        pa.array(texts, pa.string()),
    ]
    return pa.Table.from_arrays(values, schema=SCHEMA)


def rates(
    labels: LabelTable, flags: Bool[np.ndarray, "queries models"], known: Bool[np.ndarray, "queries models"]
) -> Json:
    """The arguments `share`, `by_model`, `by_benchmark` and `matrix` of a Finding: flagged pairs of the known pairs."""
    flagged, of = (by_benchmark(labels, values) for values in (flags & known, known))
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = Matrix((flagged / of).T, labels.models, labels.benchmarks)

    def shares(names: tuple[str, ...], axis: int) -> dict[str, Share]:
        counts = zip(names, flagged.sum(axis=axis), of.sum(axis=axis), strict=True)
        return {name: Share(int(count), int(total)) for name, count, total in counts if total}

    return {
        "share": Share(int(flagged.sum()), int(of.sum())),
        "by_model": shares(labels.models, 0),
        "by_benchmark": shares(labels.benchmarks, 1),
        "matrix": matrix,
    }


def by_benchmark(labels: LabelTable, flags: Bool[np.ndarray, "queries models"]) -> Int[np.ndarray, "benchmarks models"]:
    """The number of flagged queries of each benchmark and model."""
    counts = np.zeros((len(labels.benchmarks), flags.shape[1]), dtype=np.int64)
    np.add.at(counts, labels.of_benchmark, flags)
    return counts


def differing_models(
    labels: LabelTable, flags: Bool[np.ndarray, "queries models"], known: Bool[np.ndarray, "queries models"]
) -> Table:
    """Models whose rate is clearly higher than that of the other models on the same queries.

    The difference is paired: the model's flag minus the mean flag of the other models, by query. It is clear from
    CLEAR_DIFFERENCE on, if it is at least CLEAR_Z standard errors above zero and over at least MIN_QUERIES queries.
    """
    own, n = (flags & known).astype(np.float64), known.sum(axis=1, keepdims=True)
    total, rows = own.sum(axis=1, keepdims=True), []
    for model, name in enumerate(labels.models):
        use = known[:, model] & (n[:, 0] > 1)
        if use.sum() < MIN_QUERIES:
            continue
        others = (total[use, 0] - own[use, model]) / (n[use, 0] - 1)
        difference = own[use, model] - others
        mean, error = float(difference.mean()), float(difference.std(ddof=1)) / float(np.sqrt(use.sum()))
        if mean >= CLEAR_DIFFERENCE and mean >= CLEAR_Z * error:
            rows.append((name, Share(int(own[use, model].sum()), int(use.sum())), float(others.mean()), mean))
    rows.sort(key=lambda row: -row[-1])
    fractions = ("rate of the others", "difference")
    return Table("Models that differ from the others", ("model", "rate", *fractions), tuple(rows), fractions)


def accuracy(labels: LabelTable, chosen: Bool[np.ndarray, "queries models"], model: int | None = None) -> Share:
    """The right labels of the chosen pairs that have a label, of all models or of one."""
    which = slice(None) if model is None else slice(model, model + 1)
    correct = labels.outcomes.correct[:, which]
    values = correct[chosen[:, which] & np.isfinite(correct)]
    return Share(int(values.sum()), len(values))
