"""Feature families: what semantic routers read, made of texts and training labels. Paper 4.2.

In: `Sources`, all queries in the outcomes' order, and which of them are training queries. Out: `Features` of all
queries. A family is one part or several joined by +, as in pca128+knn: `embedding` (a sentence embedding, raw),
`pca128` and `pca256` (its principal components), `knn` (neighbours.py, of each model), `complexity`, `perplexity`,
`text` (the prompts themselves) and `prefill` (Eq. 1, for a hybrid). Projections and neighbours come from the training
queries alone, and none of these is its own neighbour. Knows nothing of routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from prefill_router.errors import InputError
from prefill_router.semantic.neighbours import Embedding, statistics
from prefill_router.semantic.router import Features

WIDTHS = {"pca128": 128, "pca256": 256}
PARTS = ("embedding", *WIDTHS, "knn", "complexity", "perplexity", "text", "prefill")


@dataclass(frozen=True)
class Sources:
    """Of every query: its embedding, its prompt, `text` features by family, a judge's difficulty where there is one."""

    embedding: Float[np.ndarray, "queries hidden"]
    prompts: np.ndarray
    text: Mapping[str, Float[np.ndarray, "queries _"]] = field(default_factory=dict)
    judged: Float[np.ndarray, " queries"] | None = None


def check_family(family: str, sources: Sources) -> None:
    """Raises InputError for a part that is unknown or that has no source."""
    for part in family.split("+"):
        if part not in PARTS:
            raise InputError(f"family: {family!r} has the part {part!r}; the parts are {', '.join(PARTS)}")
        if part in ("complexity", "perplexity") and part not in sources.text:
            raise InputError(f"family: {family!r} needs {part}, which is not among the text features; extract it with "
                             "jobs.features, or leave the family out")


def features_of(family: str, sources: Sources, correct: Float[np.ndarray, "queries models"],
                train: Int[np.ndarray, " train"], prefill: Float[np.ndarray, "queries features"] | None = None
                ) -> Features:
    """The family's features of all queries; `prefill` where it is a part. Raises InputError as `check_family` does."""
    check_family(family, sources)
    shared, own, prompts = [np.empty((len(correct), 0))], np.empty((*correct.shape, 0), dtype=np.float32), None
    for part in family.split("+"):
        if part in WIDTHS:
            shared.append(_principal(sources.embedding, train, WIDTHS[part]))
        elif part == "knn":
            own = _neighbour_statistics(sources.embedding, correct, train)
        elif part == "text":
            prompts = sources.prompts
        elif part == "prefill":
            assert prefill is not None, "features of a prefill router must be given"
            shared.append(prefill)
        else:
            shared.append(sources.embedding if part == "embedding" else sources.text[part])
    return Features(np.concatenate(shared, axis=1, dtype=np.float32), own, prompts, sources.judged)


def _principal(embedding: np.ndarray, train: np.ndarray, width: int) -> np.ndarray:
    mean = embedding[train].mean(axis=0)
    centred = embedding - mean
    axes = np.linalg.eigh(centred[train].T.astype(np.float64) @ centred[train])[1][:, ::-1][:, :width]
    return (centred @ axes).astype(np.float32)


def _neighbour_statistics(embedding: np.ndarray, correct: np.ndarray, train: np.ndarray) -> np.ndarray:
    unit = Embedding(embedding[train].mean(axis=0))(embedding)
    inside = np.zeros(len(unit), dtype=bool)
    inside[train] = True
    rest = np.flatnonzero(~inside)
    left_out = statistics(unit[train], correct[train], unit[train], own=np.arange(len(train)))
    values = np.empty((len(unit), *left_out.shape[1:]), dtype=np.float32)
    values[train] = left_out
    values[rest] = statistics(unit[train], correct[train], unit[rest])
    return values
