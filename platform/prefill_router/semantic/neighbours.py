"""Nearest training queries, votes of their labels, and the kNN statistics of paper 4.2.

In: embeddings [queries, hidden] and the training queries' labels [known, models], NaN if missing. Out: distances and
positions of the k nearest (Euclidean, exact: a flat FAISS index, Johnson et al. 2019); shares of right answers; per
query and model ten statistics for each of five values of k. Does not split queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from prefill_router.errors import InputError

NEIGHBOURS = (5, 10, 25, 50, 100)
STATISTICS = (
    "right",
    "right_by_inverse_distance",
    "right_by_rank",
    "right_in_nearer_half",
    "distance",
    "distance_sd",
    "distance_right",
    "distance_wrong",
    "nearest_right",
    "nearest_wrong",
)
CHUNK = 1024  # queries per batch of label computations
Kernel = Literal["uniform", "inverse", "gaussian"]


@dataclass(frozen=True)
class Embedding:
    """Centres vectors on the training mean and scales them to unit length; centring removes the shared direction."""

    mean: Float[np.ndarray, " hidden"]

    def __call__(self, states: Float[np.ndarray, "queries hidden"]) -> Float[np.ndarray, "queries hidden"]:
        centred = states - self.mean
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def search(
    known: Float[np.ndarray, "known hidden"],
    queries: Float[np.ndarray, "queries hidden"],
    k: int,
    own: Int[np.ndarray, " queries"] | None = None,
    groups: Int[np.ndarray, " known"] | None = None,
    at_once: int | None = None,
) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
    """(distances, positions in `known`) of each query's k nearest, nearest first; fewer than k if `known` is smaller.

    With `own` (the queries' groups) and `groups` (those of the known rows), known rows of a query's own group are
    excluded, including the query itself. `at_once` is the number of queries per FAISS call: from 20 queries FAISS uses
    a matrix product, whose rounding depends on the other queries of the call.
    """
    import faiss

    index = faiss.IndexFlatL2(known.shape[1])
    index.add(np.ascontiguousarray(known, dtype=np.float32))
    largest = int(np.bincount(np.unique(groups, return_inverse=True)[1]).max()) if groups is not None else 0
    depth = min(k + largest, len(known))
    queries, step = np.ascontiguousarray(queries, dtype=np.float32), at_once or max(len(queries), 1)
    parts = [index.search(queries[start : start + step], depth) for start in range(0, max(len(queries), 1), step)]
    squares, rows = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    if own is not None and groups is not None:
        others_first = np.argsort(groups[rows] == own[:, None], axis=1, kind="stable")[
            :, : min(k, len(known) - largest)
        ]
        squares, rows = (np.take_along_axis(array, others_first, axis=1) for array in (squares, rows))
    return np.sqrt(np.maximum(squares, 0)), rows


def share_right(
    distances: Float[np.ndarray, "queries k"],
    labels: Float[np.ndarray, "queries k models"],
    kernel: Kernel,
    fallback: Float[np.ndarray, "#queries models"],
) -> Float[np.ndarray, "queries models"]:
    """The share of right answers among labelled neighbours, weighted by `kernel`; `fallback` if none is labelled.

    Weights by distance d: `uniform` 1, `inverse` 1 / (d + 0.001), `gaussian` exp(-(d / d_k)^2 / 2) with d_k the
    distance of the farthest neighbour.
    """
    weights = np.ones_like(distances)
    if kernel == "inverse":
        weights = 1 / (distances + 1e-3)
    elif kernel == "gaussian":
        weights = np.exp(-np.square(distances / np.maximum(distances[:, -1:], 1e-6)) / 2)
    return _weighted(labels, weights, fallback)


def votes(
    known: Float[np.ndarray, "known hidden"],
    correct: Float[np.ndarray, "known models"],
    queries: Float[np.ndarray, "queries hidden"],
    ks: Sequence[int],
    kernel: Kernel,
    fallback: Float[np.ndarray, " models"],
) -> dict[int, Float[np.ndarray, "queries models"]]:
    """A mapping from every k of `ks` to `share_right` of each query's k nearest known queries, from one search."""
    distances, rows = search(known, queries, max(ks))
    found = {k: np.empty((len(queries), correct.shape[1])) for k in ks}
    for start in range(0, len(queries), CHUNK):
        part = slice(start, start + CHUNK)
        labels = correct[rows[part]]
        for k in ks:
            found[k][part] = share_right(distances[part, :k], labels[:, :k], kernel, fallback[None])
    return found


def statistics(
    known: Float[np.ndarray, "known hidden"],
    correct: Float[np.ndarray, "known models"],
    queries: Float[np.ndarray, "queries hidden"],
    own: Int[np.ndarray, " queries"] | None = None,
    groups: Int[np.ndarray, " known"] | None = None,
) -> Float[np.ndarray, "queries models fifty"]:
    """STATISTICS for every k of NEIGHBOURS, k by k. `own` and `groups` as in `search`.

    The `right*` statistics are shares of right answers among labelled neighbours; `right_by_rank` weighs the r-th
    nearest by 1 / r. If no neighbour is labelled, they are the model's share of right answers outside the query's
    group. `distance_right` and `distance_wrong` are mean distances of the neighbours with that label, `nearest_right`
    and `nearest_wrong` the smallest; if no neighbour has the label, they are the distance of the k-th neighbour.
    Raises InputError if all known queries are of one group.
    """
    distances, rows = search(known, queries, max(NEIGHBOURS), own, groups)
    if not distances.shape[1]:
        raise InputError(
            "group: all training queries are of one group, so none has a neighbour of another group; leave the "
            "family knn out, or give the outcomes finer groups"
        )
    fallback = _shares(correct, len(queries), own, groups)
    values = np.empty((len(queries), correct.shape[1], len(NEIGHBOURS) * len(STATISTICS)), dtype=np.float32)
    for start in range(0, len(queries), CHUNK):
        part = slice(start, start + CHUNK)
        d, labels = distances[part], correct[rows[part]]
        values[part] = np.concatenate([_at(d[:, :k], labels[:, :k], fallback[part]) for k in NEIGHBOURS], axis=-1)
    return values


def _shares(correct: np.ndarray, n_queries: int, own: np.ndarray | None, groups: np.ndarray | None) -> np.ndarray:
    """[queries, models]: each model's share of right answers among the known rows outside the query's group."""
    labelled = np.isfinite(correct).astype(np.float64)
    right, count = np.where(labelled > 0, correct, 0), labelled
    sums = [np.broadcast_to(array.sum(axis=0), (n_queries, correct.shape[1])) for array in (right, count)]
    if own is not None and groups is not None:
        names, of_row = np.unique(groups, return_inverse=True)
        of_query = np.searchsorted(names, own)
        for side, array in enumerate((right, count)):
            of_group = np.zeros((len(names), correct.shape[1]))
            np.add.at(of_group, of_row, array)
            sums[side] = sums[side] - of_group[of_query]
    return np.where(sums[1] > 0, sums[0] / np.maximum(sums[1], 1), 0.5)


def _at(d: np.ndarray, labels: np.ndarray, fallback: np.ndarray) -> Float[np.ndarray, "queries models ten"]:
    n_models, k = labels.shape[2], d.shape[1]
    half = max(k // 2, 1)
    ranks = np.broadcast_to(1 / np.arange(1, k + 1), d.shape)
    shares = [
        share_right(d, labels, "uniform", fallback),
        share_right(d, labels, "inverse", fallback),
        _weighted(labels, ranks, fallback),
        share_right(d[:, :half], labels[:, :half], "uniform", fallback),
    ]
    spread = [np.repeat(values[:, None], n_models, axis=1) for values in (d.mean(axis=1), d.std(axis=1))]
    means, nearest = [], []
    for wanted in (1, 0):
        is_it = labels == wanted
        count = is_it.sum(axis=1)
        mean = (d[:, :, None] * is_it).sum(axis=1) / np.maximum(count, 1)
        means.append(np.where(count > 0, mean, d[:, -1:]))
        nearest.append(np.where(is_it, d[:, :, None], d[:, -1:, None]).min(axis=1))
    return np.stack([*shares, *spread, *means, *nearest], axis=-1)


def _weighted(labels: np.ndarray, weights: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    known = np.isfinite(labels)
    total = (known * weights[:, :, None]).sum(axis=1)
    right = (np.where(known, labels, 0) * weights[:, :, None]).sum(axis=1)
    return np.where(total > 0, right / np.where(total > 0, total, 1), fallback)
