"""The gate policy: what a candidate must meet to become the champion (configs/gates.yaml, docs/promoting.md).

In: a YAML file that states every field. Out: an immutable `GatePolicy` and its digest. Knows nothing of how the
figures are measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from prefill_router.config import FrozenModel
from prefill_router.files import read_yaml, sha256_strings

Share = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(gt=0)]


class Bound(FrozenModel):
    """One gate. A gate that is not in the policy (null) is not checked."""

    required: Annotated[bool, Field(description="refuse a candidate for which the gate was not measured")]


class NonInferiority(Bound):
    """The candidate may be worse by less than a margin, on the paired interval."""

    margin: Annotated[
        float,
        Field(ge=-1, le=1, description="the candidate must be shown to be worse by less; negative: better by more"),
    ]


class Regression(Bound):
    """No benchmark may regress, in accuracy at the chosen lambda."""

    max_regression: Annotated[Share, Field(description="tolerated loss of accuracy within a benchmark")]
    min_queries: Annotated[
        int, Field(ge=1, description="benchmarks with fewer test queries with complete labels are pooled into one")
    ]


class Floor(Bound):
    """An absolute bound on the lower end of the candidate's interval."""

    above: Annotated[Share, Field(description="the lower end must be above it")]


class Ceiling(Bound):
    """An absolute bound on the upper end of the candidate's interval, as a share."""

    below: Annotated[Share, Field(description="the upper end must be below it")]


class Latency(Bound):
    """A bound on the upper end of the interval of a median, in milliseconds."""

    below: Annotated[Milliseconds, Field(description="milliseconds; the upper end of the median must be below it")]


class PoolBound(FrozenModel):
    """The candidate's pool must have every model of the champion's pool."""

    may_remove: Annotated[tuple[str, ...], Field(description="models of the champion's pool that may be missing")]


class GatePolicy(FrozenModel):
    """Every field must be stated. Figures have their names in metrics.json."""

    level: Annotated[
        float,
        Field(
            ge=0.5, lt=1, description="two-sided level of the intervals; each end is a bound of level (1 + level) / 2"
        ),
    ]
    resamples: Annotated[int, Field(ge=200, description="bootstrap resamples of the test queries, by group")]
    seed: Annotated[int, Field(ge=0, description="seed of the bootstrap")]
    min_queries: Annotated[
        int, Field(ge=1, description="test queries that a comparison needs; with fewer, nothing is measured")
    ]
    pool: PoolBound
    auc_floor: Floor | None
    decision_ms: Latency | None
    request_ms: Latency | None
    flip_rate: Ceiling | None
    auc: NonInferiority | None
    brier: NonInferiority | None
    p_auccc_exact: NonInferiority | None
    headroom_captured: NonInferiority | None
    benchmarks: Regression | None

    @property
    def digest(self) -> str:
        """16 hex digits of the resolved policy, for tags."""
        return sha256_strings([self.model_dump_json()])[:16]


def load_policy(path: Path) -> GatePolicy:
    """Reads a policy. Raises InputError as `read_yaml` does."""
    return read_yaml(path, GatePolicy)
