"""Feature families: what semantic routers read, made of texts and training labels. Paper 4.2.

In: `Sources`, all queries in the outcomes' order, and which of them are training queries. Out: `Features` of all
queries. A family is one part or several joined by +, as in pca128+knn: `embedding` (a sentence embedding, raw),
`pca128` and `pca256` (its principal components, made as the prefill router makes its own), `knn` (neighbours.py, of
each model), `complexity`, `perplexity`, `text` (the prompts themselves) and `prefill` (Eq. 1, for a hybrid).
Projections and neighbours come from the training queries alone; none of these, nor any of its group, is its own
neighbour. Knows nothing of routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from prefill_router.errors import InputError
from prefill_router.semantic.neighbours import Embedding, statistics
from prefill_router.semantic.router import Features
from prefill_router.signals.projection import fit_projection, fold_moments

WIDTHS = {"pca128": 128, "pca256": 256}
COMPONENTS = (*WIDTHS, "prefill")
PARTS = ("embedding", *WIDTHS, "knn", "complexity", "perplexity", "text", "prefill")


@dataclass(frozen=True)
class Sources:
    """Of every query: its embedding, its prompt, `text` features by family, a judge's difficulty where there is one,
    the number of the group that splits keep together."""

    embedding: Float[np.ndarray, "queries hidden"]
    prompts: np.ndarray
    text: Mapping[str, Float[np.ndarray, "queries _"]] = field(default_factory=dict)
    judged: Float[np.ndarray, " queries"] | None = None
    groups: Int[np.ndarray, " queries"] | None = None


def check_family(family: str, sources: Sources) -> None:
    """Raises InputError for a part that is unknown or that has no source."""
    parts = family.split("+")
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise InputError(f"family: {family!r} has the part {twice[0]!r} twice; give each part once")
    for part in parts:
        if part not in PARTS:
            raise InputError(f"family: {family!r} has the part {part!r}; the parts are {', '.join(PARTS)}")
        if part in ("complexity", "perplexity") and part not in sources.text:
            raise InputError(
                f"family: {family!r} needs {part}, which is not among the text features; extract it with "
                "jobs.features, or leave the family out"
            )


def features_of(
    family: str,
    sources: Sources,
    correct: Float[np.ndarray, "queries models"],
    train: Int[np.ndarray, " train"],
    prefill: Float[np.ndarray, "queries features"] | None = None,
) -> Features:
    """The family's features of all queries; `prefill` where it is a part. Raises InputError as `check_family` does."""
    check_family(family, sources)
    parts = family.split("+")
    assert "prefill" not in parts or prefill is not None, "features of a prefill router must be given"
    components = [
        prefill if prefill is not None and part == "prefill" else _principal(sources.embedding, train, WIDTHS[part])
        for part in parts
        if part in COMPONENTS
    ]
    rest = [
        sources.embedding if part == "embedding" else sources.text[part]
        for part in parts
        if part in ("embedding", "complexity", "perplexity")
    ]
    nothing = np.empty((len(correct), 0))
    shared = np.concatenate([nothing, *components, *rest], axis=1, dtype=np.float32)
    own = (
        _neighbour_statistics(sources, correct, train)
        if "knn" in parts
        else np.empty((*correct.shape, 0), dtype=np.float32)
    )
    return Features(
        shared,
        own,
        sources.prompts if "text" in parts else None,
        sources.judged,
        sources.groups,
        ready=sum(part.shape[1] for part in components),
    )


def _principal(embedding: np.ndarray, train: np.ndarray, width: int) -> np.ndarray:
    """As the prefill router projects a block: standardised, then PCA."""
    projection = fit_projection(fold_moments(embedding[train], np.zeros(len(train), dtype=np.int64))[0], width)
    return projection(embedding)


def _neighbour_statistics(sources: Sources, correct: np.ndarray, train: np.ndarray) -> np.ndarray:
    unit = Embedding(sources.embedding[train].mean(axis=0))(sources.embedding)
    groups = np.arange(len(unit)) if sources.groups is None else sources.groups
    inside = np.zeros(len(unit), dtype=bool)
    inside[train] = True
    rest = np.flatnonzero(~inside)
    left_out = statistics(unit[train], correct[train], unit[train], groups[train], groups[train])
    values = np.empty((len(unit), *left_out.shape[1:]), dtype=np.float32)
    values[train] = left_out
    values[rest] = statistics(unit[train], correct[train], unit[rest])
    return values
