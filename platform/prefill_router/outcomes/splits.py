"""Splits and folds: stratified by benchmark x partition, groups whole, reproducible from a seed.

In: `Outcomes`. Out: sorted query positions per part, or a fold number per query (EQUATIONS.md, Splits).

Strata are laid end to end and parts are dealt along that line by error diffusion, so that every stretch of it
holds its share to within half a unit. A class too small to be split by itself thereby shares with its neighbour,
the next class of the same benchmark.
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
    """Splits the queries; under one seed the test part of both schemes is the same.

    Raises InputError when there are too few groups to fill every part.
    """
    units = _line_of_units(outcomes, np.arange(len(outcomes)), seed)
    is_test = _deal(units, TEST_SHARE, len(outcomes))
    is_calibration = np.zeros(len(outcomes), dtype=bool)
    if scheme == "75/10/15":
        rest = [unit for unit in units if not is_test[unit[0]]]
        is_calibration = _deal(rest, CALIBRATION_SHARE / (1 - TEST_SHARE), len(outcomes))
    split = Split(np.flatnonzero(~is_test & ~is_calibration), np.flatnonzero(is_calibration), np.flatnonzero(is_test))
    wanted = (split.train, split.test) if scheme == "85/15" else (split.train, split.calibration, split.test)
    if any(len(part) == 0 for part in wanted):
        raise InputError(f"outcomes: {len(units)} groups of queries are too few for a {scheme} split")
    return split


def make_folds(
    outcomes: Outcomes, queries: Int[np.ndarray, " part"], seed: int, n_folds: int = 5
) -> Int[np.ndarray, " part"]:
    """A fold number 0..n_folds-1 for each of `queries`, stratified like the splits, groups whole.

    Raises InputError when there are fewer groups than folds.
    """
    units = _line_of_units(outcomes, queries, seed)
    if len(units) < n_folds:
        raise InputError(f"outcomes: {len(units)} groups of queries are too few for {n_folds} folds")
    fold_of = np.full(len(outcomes), -1)
    sizes = np.zeros(n_folds, dtype=np.int64)
    for unit in units:
        fold = int(np.argmin(sizes))
        fold_of[unit] = fold
        sizes[fold] += len(unit)
    return fold_of[queries]


def _line_of_units(outcomes: Outcomes, queries: np.ndarray, seed: int) -> list[np.ndarray]:
    """The groups among `queries` as arrays of positions, shuffled within strata, strata end to end."""
    stratum_of = [
        f"{benchmark}\x1f{partition}"
        for benchmark, partition in zip(outcomes.benchmarks, partitions(outcomes.correct), strict=True)
    ]
    members: dict[str, list[int]] = {}
    for query in queries:
        members.setdefault(outcomes.groups[query], []).append(int(query))
    names = sorted(members)  # independent of the table's row order
    noise = np.random.default_rng(seed).random(len(names))

    def key(index: int) -> tuple[str, float]:
        strata = Counter(stratum_of[query] for query in members[names[index]])
        return min(strata, key=lambda stratum: (-strata[stratum], stratum)), noise[index]

    return [np.asarray(members[names[index]]) for index in sorted(range(len(names)), key=key)]


def _deal(units: list[np.ndarray], share: float, n_queries: int) -> np.ndarray:
    """Marks about `share` of the units' queries, evenly along the line."""
    marked = np.zeros(n_queries, dtype=bool)
    seen = taken = 0
    for unit in units:
        seen += len(unit)
        if share * seen - taken >= len(unit) / 2:
            marked[unit] = True
            taken += len(unit)
    return marked
