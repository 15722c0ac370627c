"""Duplicate prompts: equal prompts, near-duplicates, labels that differ between them, and leaks of a split.

In: `LabelTable`. Out: `Finding`. Prompts are near-duplicates if they are equal after `duplicates.normalised`. Labels
are compared by model: of a set of duplicates with n labels of a model, r of them right, r (n - r) of the n (n - 1) / 2
pairs of labels differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from prefill_router.errors import InputError
from prefill_router.outcomes.duplicates import normalised
from prefill_router.outcomes.quality.findings import Finding, Json, Share, Table, suspects
from prefill_router.outcomes.quality.table import LabelTable
from prefill_router.outcomes.splits import Scheme, split_queries

SCHEME: Scheme = "85/15"  # the default of training
SEED = 0


def duplicates(labels: LabelTable) -> Finding:
    """Queries with an equal or nearly equal prompt, and pairs of them with different labels."""
    outcomes = labels.outcomes
    equal = _codes(outcomes.prompts)
    near = _codes([normalised(prompt) or f"\0{prompt}" for prompt in outcomes.prompts])  # "?" has no near-duplicate
    n_equal, n_near = (np.bincount(codes)[codes] for codes in (equal, near))
    here = _codes(list(zip(near.tolist(), outcomes.benchmarks, strict=True)))
    n_here = np.bincount(here)[here]
    repeated = n_near > 1
    kinds = {
        "equal prompts": n_equal > 1,
        "near-duplicates that are not equal": n_near > n_equal,
        "within a benchmark": n_here > 1,
        "in another benchmark": n_near > n_here,
    }
    tables = [_table("Kinds of duplicates", "queries", {name: _share(flags) for name, flags in kinds.items()})]
    differing, of = _differing(labels, near, repeated)
    if of.sum():
        shares = {
            labels.models[model]: Share(int(differing[model]), int(of[model]))
            for model in np.argsort(-differing / np.maximum(of, 1), kind="stable")
            if of[model]
        }
        tables.append(_table("Duplicates with different labels", "pairs of labels that differ", shares))
    figures: Json = {"label_pairs": int(of.sum()), "label_pairs_that_differ": int(differing.sum())}
    return Finding(
        "duplicates",
        "queries",
        _share(repeated),
        by_benchmark={
            name: share
            for number, name in enumerate(labels.benchmarks)
            if (share := _share(repeated[labels.of_benchmark == number])).count
        },
        tables=tuple(tables),
        figures=figures | _leak(labels, near),
        suspects=_pairs(labels, near, equal, repeated),
    )


def _codes(values: Iterable[Hashable]) -> Int[np.ndarray, " queries"]:
    """Equal codes for equal values, in order of first appearance."""
    found: dict[Hashable, int] = {}
    return np.array([found.setdefault(value, len(found)) for value in values], dtype=np.int64)


def _share(flags: np.ndarray) -> Share:
    return Share(int(flags.sum()), len(flags))


def _table(heading: str, counted: str, shares: dict[str, Share]) -> Table:
    first = "model" if counted != "queries" else "kind"
    return Table(heading, (first, counted), tuple(shares.items()))


def _differing(labels: LabelTable, near: np.ndarray, repeated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By model: pairs of labels of duplicates that differ, and all pairs of labels of duplicates."""
    correct = labels.outcomes.correct[repeated]
    _, unit = np.unique(near[repeated], return_inverse=True)
    n, right = (np.zeros((unit.max(initial=-1) + 1, correct.shape[1]), dtype=np.int64) for _ in range(2))
    np.add.at(n, unit, np.isfinite(correct))
    np.add.at(right, unit, correct == 1)
    return (right * (n - right)).sum(axis=0), (n * (n - 1) // 2).sum(axis=0)


def _leak(labels: LabelTable, near: np.ndarray) -> Json:
    """Queries and pairs with a duplicate in the other part of a split; None if the queries cannot be split."""
    names = ("leaked_queries", "leaked_pairs", "test_queries")
    try:
        split = split_queries(labels.outcomes, SEED, SCHEME)
    except InputError:  # too few groups
        return dict.fromkeys(names)
    size = near.max() + 1
    train, test = (np.bincount(near[part], minlength=size) for part in (split.train, split.test))
    queries = int((train + test)[(train > 0) & (test > 0)].sum())
    return dict(zip(names, (queries, int(train @ test), len(split.test)), strict=True))


def _pairs(labels: LabelTable, near: np.ndarray, equal: np.ndarray, repeated: np.ndarray) -> pa.Table:
    """Each duplicate with the first query of its set; `score` is the share of the models whose labels differ."""
    _, first = np.unique(near, return_index=True)
    queries = np.flatnonzero(repeated & (first[near] != np.arange(len(near))))
    others = first[near[queries]]
    one, other = labels.outcomes.correct[queries], labels.outcomes.correct[others]
    known = (np.isfinite(one) & np.isfinite(other)).sum(axis=1)
    differ = (np.abs(one - other) == 1).sum(axis=1)
    score = np.divide(differ, known, out=np.full(len(queries), np.nan), where=known > 0)
    order = np.argsort(-np.nan_to_num(score, nan=-1.0), kind="stable")
    queries, others, score, known, differ = (values[order] for values in (queries, others, score, known, differ))
    detail = [
        f"{'equal prompts' if same else 'near-duplicates'}; labels of {d} of {k} models differ"
        for same, d, k in zip(equal[queries] == equal[others], differ, known, strict=True)
    ]
    return suspects(labels, "duplicate", queries, others=others, score=score, detail=detail)
