"""Splits and folds, stratified by benchmark x partition, with groups kept together, reproducible from a seed.

In: `Outcomes`. Out: sorted query positions per part, or a fold number per query (docs/equations.md, Splits).

The groups are ordered by stratum and assigned to parts by error diffusion along this order. Every section of it thus
has its share of each part to within half a group, and a stratum too small to split is pooled with the next stratum of
its benchmark.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from prefill_router.errors import InputError
from prefill_router.outcomes.table import Outcomes, partitions

TEST_SHARE = 0.15
CALIBRATION_SHARE = 0.10
Scheme = Literal["85/15", "75/10/15"]


@dataclass(frozen=True)
class Split:
    """Positions on the query axis, sorted. `calibration` is empty under 85/15."""

    train: Int[np.ndarray, " train"]
    calibration: Int[np.ndarray, " calibration"]
    test: Int[np.ndarray, " test"]


def split_queries(outcomes: Outcomes, seed: int, scheme: Scheme = "85/15") -> Split:
    """Splits the queries. Both schemes have the same test part for one seed.

    Raises InputError if there are too few groups to fill every part.
    """
    units = _ordered_units(outcomes, np.arange(len(outcomes)), seed)
    is_test = _mark_share(units, TEST_SHARE, len(outcomes))
    is_calibration = np.zeros(len(outcomes), dtype=bool)
    if scheme == "75/10/15":
        rest = [unit for unit in units if not is_test[unit[0]]]
        is_calibration = _mark_share(rest, CALIBRATION_SHARE / (1 - TEST_SHARE), len(outcomes))
    split = Split(np.flatnonzero(~is_test & ~is_calibration), np.flatnonzero(is_calibration), np.flatnonzero(is_test))
    wanted = (split.train, split.test) if scheme == "85/15" else (split.train, split.calibration, split.test)
    if any(len(part) == 0 for part in wanted):
        raise _too_few_groups(len(outcomes), len(units), f"split {scheme}")
    return split


def make_folds(
    outcomes: Outcomes, queries: Int[np.ndarray, " part"], seed: int, n_folds: int = 5
) -> Int[np.ndarray, " part"]:
    """A fold number 0..n_folds-1 for each of `queries`, stratified and grouped like the splits.

    Raises InputError if there are fewer groups than folds.
    """
    units = _ordered_units(outcomes, queries, seed)
    if len(units) < n_folds:
        raise _too_few_groups(len(queries), len(units), f"{n_folds} folds")
    fold_of = np.full(len(outcomes), -1)
    sizes = np.zeros(n_folds, dtype=np.int64)
    for unit in units:
        fold = int(np.argmin(sizes))
        fold_of[unit] = fold
        sizes[fold] += len(unit)
    return fold_of[queries]


def _too_few_groups(queries: int, groups: int, purpose: str) -> InputError:
    """The error of queries that form too few groups."""
    noun = "group" if groups == 1 else "groups"
    return InputError(
        f"outcomes: {queries} queries form {groups} {noun}, too few for {purpose}: queries "
        "of one `group` and queries with equal prompts are one group; add queries, or check the column `group`"
    )


def _ordered_units(outcomes: Outcomes, queries: np.ndarray, seed: int) -> list[np.ndarray]:
    """The groups of `queries` as arrays of positions, ordered by stratum and shuffled within it."""
    stratum_of = [
        f"{benchmark}\x1f{partition}"
        for benchmark, partition in zip(outcomes.benchmarks, partitions(outcomes.correct), strict=True)
    ]
    members: dict[str, list[int]] = {}
    for query in queries:
        members.setdefault(outcomes.groups[query], []).append(int(query))
    names = sorted(members)  # independent of the row order of the table
    noise = np.random.default_rng(seed).random(len(names))

    def key(index: int) -> tuple[str, float]:
        strata = Counter(stratum_of[query] for query in members[names[index]])
        return min(strata, key=lambda stratum: (-strata[stratum], stratum)), noise[index]

    return [np.asarray(members[names[index]]) for index in sorted(range(len(names)), key=key)]


def _mark_share(units: list[np.ndarray], share: float, n_queries: int) -> np.ndarray:
    """Marks about `share` of the queries of the units, evenly along their order."""
    marked = np.zeros(n_queries, dtype=bool)
    seen = taken = 0
    for unit in units:
        seen += len(unit)
        if share * seen - taken >= len(unit) / 2:
            marked[unit] = True
            taken += len(unit)
    return marked
