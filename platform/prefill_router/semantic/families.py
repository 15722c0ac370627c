"""Feature families of semantic routers, computed from texts, embeddings and training labels (paper 4.2).

In: `Sources` of all queries in the outcomes' order, and the training queries. Out: `Features` of all queries. A family
is one part or several parts joined by +, such as pca128+knn. Parts: `embedding` (a raw text embedding); `pca128`,
`pca256` (its principal components, standardised before PCA as in the prefill router); `knn` (the statistics of
neighbours.py per model); `complexity`; `perplexity`; `text` (the prompts); `prefill` (Eq. 1 of docs/equations.md, for a
hybrid). All parts of a family read the embedding of one encoder. Projections and neighbours come from the training
queries only. A training query's neighbours exclude the query itself and its group. Does not depend on the routers.
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
OF_EMBEDDING = ("embedding", *WIDTHS, "knn")  # parts that read an embedding
PARTS = (*OF_EMBEDDING, "complexity", "perplexity", "text", "prefill")


@dataclass(frozen=True)
class Sources:
    """Inputs of the feature families, arrays with one entry per query.

    `embeddings`: by encoder name, the default first. `text`: text features by family. `judged`: a judge's difficulty,
    0 easy to 1 hard, NaN if missing. `groups`: number of the query's group, which splits keep together.
    """

    embeddings: Mapping[str, Float[np.ndarray, "queries _"]]
    prompts: np.ndarray
    text: Mapping[str, Float[np.ndarray, "queries _"]] = field(default_factory=dict)
    judged: Float[np.ndarray, " queries"] | None = None
    groups: Int[np.ndarray, " queries"] | None = None

    def embedding(self, encoder: str | None = None) -> Float[np.ndarray, "queries hidden"]:
        """The embedding of the encoder with this name; None: the first."""
        return self.embeddings[next(iter(self.embeddings)) if encoder is None else encoder]


def reads_embedding(family: str) -> bool:
    """Whether a part of the family reads an embedding."""
    return any(part in OF_EMBEDDING for part in family.split("+"))


def check_family(family: str, sources: Sources, encoder: str | None = None) -> None:
    """Raises InputError for a part that is unknown, repeated or without a source, or for an unknown encoder."""
    if encoder not in (None, *sources.embeddings):
        raise InputError(
            f"encoder: got {encoder!r}, the encoders with an embedding are {', '.join(sources.embeddings)}; choose one "
            "of them, or give its activations with the mean-pooled final layer"
        )
    parts = family.split("+")
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise InputError(f"family: {family!r} has the part {twice[0]!r} more than once; give each part once")
    for part in parts:
        if part not in PARTS:
            raise InputError(f"family: {family!r} has the part {part!r}; the parts are {', '.join(PARTS)}")
        if part in ("complexity", "perplexity") and part not in sources.text:
            raise InputError(
                f"family: {family!r} needs {part}, which is not among the text features "
                f"({', '.join(sources.text) or 'none'}); extract it with jobs.features, or leave the family out"
            )


def features_of(
    family: str,
    sources: Sources,
    correct: Float[np.ndarray, "queries models"],
    train: Int[np.ndarray, " train"],
    prefill: Float[np.ndarray, "queries features"] | None = None,
    encoder: str | None = None,
) -> Features:
    """The family's features of all queries, from the embedding of `encoder` (None: the first encoder).

    The part `prefill` needs `prefill`. Raises InputError as `check_family`.
    """
    check_family(family, sources, encoder)
    parts, embedding = family.split("+"), sources.embedding(encoder)
    assert "prefill" not in parts or prefill is not None, (
        "the family has the part prefill: pass the prefill router's features"
    )
    components = [
        prefill if prefill is not None and part == "prefill" else _principal(embedding, train, WIDTHS[part])
        for part in parts
        if part in COMPONENTS
    ]
    rest = [
        embedding if part == "embedding" else sources.text[part]
        for part in parts
        if part in ("embedding", "complexity", "perplexity")
    ]
    nothing = np.empty((len(correct), 0))
    shared = np.concatenate([nothing, *components, *rest], axis=1, dtype=np.float32)
    own = (
        _neighbour_statistics(embedding, sources.groups, correct, train)
        if "knn" in parts
        else np.empty((*correct.shape, 0), dtype=np.float32)
    )
    return Features(
        shared,
        own,
        prompts=sources.prompts if "text" in parts else None,
        judged=sources.judged,
        groups=sources.groups,
        ready=sum(part.shape[1] for part in components),
    )


def _principal(embedding: np.ndarray, train: np.ndarray, width: int) -> np.ndarray:
    """Principal components, computed as the prefill router projects a layer: standardised, then PCA."""
    projection = fit_projection(fold_moments(embedding[train], np.zeros(len(train), dtype=np.int64))[0], width)
    return projection(embedding)


def _neighbour_statistics(
    embedding: np.ndarray, groups: np.ndarray | None, correct: np.ndarray, train: np.ndarray
) -> np.ndarray:
    unit = Embedding(embedding[train].mean(axis=0))(embedding)
    groups = np.arange(len(unit)) if groups is None else groups
    inside = np.zeros(len(unit), dtype=bool)
    inside[train] = True
    rest = np.flatnonzero(~inside)
    left_out = statistics(unit[train], correct[train], unit[train], groups[train], groups[train])
    values = np.empty((len(unit), *left_out.shape[1:]), dtype=np.float32)
    values[train] = left_out
    values[rest] = statistics(unit[train], correct[train], unit[rest])
    return values
