"""Outcomes and activations, joined on query_id: the queries that have both, and their states by block.

In: `Outcomes` and one or more activations datasets over the same prompts. Out: `Signals`. Prompts are checked by
digest; queries whose prompt could not be encoded are left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from prefill_router.errors import InputError
from prefill_router.outcomes.table import Outcomes
from prefill_router.prefill.config import EncoderConfig
from prefill_router.prefill.dataset import Activations
from prefill_router.prefill.encoder import parse_column
from prefill_router.signals.layer_key import LayerKey


@dataclass(frozen=True)
class Signals:
    """`outcomes` holds the queries that have states, `n_tokens` each encoder's counts, `left_out` other ids."""

    outcomes: Outcomes
    activations: Mapping[str, Activations]
    layer_keys: tuple[LayerKey, ...]
    n_tokens: Mapping[str, Int[np.ndarray, " queries"]]
    left_out: tuple[str, ...]

    def states(self, key: LayerKey, rows: Int[np.ndarray, " part"] | None = None) -> Float[np.ndarray, "part hidden"]:
        """float32, of those `rows` of the outcomes or of all, read from disk at each call: none is kept."""
        ids, digests = self.outcomes.query_ids, self.outcomes.prompt_digests
        if rows is not None:
            ids, digests = ids[rows], [digests[row] for row in rows]
        return self.activations[key.encoder].states(key.column, list(ids), digests)

    @property
    def digest(self) -> str:
        """The digests of the activations datasets, joined by `+`."""
        return "+".join(dataset.digest for dataset in self.activations.values())

    @property
    def encoders(self) -> dict[str, EncoderConfig]:
        """By fingerprint, how each dataset's encoder was loaded."""
        return {fingerprint: dataset.encoder_config for fingerprint, dataset in self.activations.items()}

    def final_layer(self) -> LayerKey:
        """The first encoder's last layer, mean pooled: what an embedding model would return, before its norm."""
        fingerprint, dataset = next(iter(self.activations.items()))
        key = LayerKey(fingerprint, "mean", dataset.encoder.n_layers)
        if key not in self.layer_keys:
            raise InputError(
                f"activations: the baselines read {key.column!r}, the dataset holds "
                f"{', '.join(dataset.columns)}; prefill with the final layer and pooling mean"
            )
        return key


def join(outcomes: Outcomes, activations: Sequence[Activations]) -> Signals:
    """Raises InputError for a query without a row, another prompt, the same encoder twice, or nothing left."""
    datasets = {dataset.fingerprint: dataset for dataset in activations}
    if len(datasets) < len(activations):
        raise InputError("activations: two datasets are of the same encoder; give each encoder once")
    failed = {query_id for dataset in activations for query_id in dataset.errors().column("query_id").to_pylist()}
    keep = np.flatnonzero([query_id not in failed for query_id in outcomes.query_ids])
    if not len(keep):
        raise InputError("activations: no query of the outcomes could be encoded; see the column 'error'")
    left_out = tuple(query_id for query_id in outcomes.query_ids if query_id in failed)
    outcomes = outcomes.take(keep)
    for dataset in activations:
        dataset.check(list(outcomes.query_ids), outcomes.prompt_digests)
    layer_keys = tuple(
        sorted(
            LayerKey(fingerprint, *parse_column(column))
            for fingerprint, dataset in datasets.items()
            for column in dataset.columns
        )
    )
    n_tokens = {name: dataset.n_tokens(list(outcomes.query_ids)) for name, dataset in datasets.items()}
    return Signals(outcomes, datasets, layer_keys, n_tokens, left_out)
