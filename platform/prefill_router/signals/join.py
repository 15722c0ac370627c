"""Joins outcomes and activations on query_id.

In: `Outcomes` and one or more activations datasets over the same prompts. Out: `Signals`: the queries with outcomes and
states. Prompts are checked by digest. Queries with an encoding error in any dataset are left out and listed.
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
    """Outcomes and states of the same queries.

    `outcomes`: the queries with states. `activations`: datasets by encoder fingerprint. `layer_keys`: all candidate
    layers, sorted. `n_tokens`: token counts by encoder fingerprint. `left_out`: ids of the queries without states.
    """

    outcomes: Outcomes
    activations: Mapping[str, Activations]
    layer_keys: tuple[LayerKey, ...]
    n_tokens: Mapping[str, Int[np.ndarray, " queries"]]
    left_out: tuple[str, ...]

    def states(self, key: LayerKey, rows: Int[np.ndarray, " part"] | None = None) -> Float[np.ndarray, "part hidden"]:
        """The states of `rows` of the outcomes (None: all), float32. Every call reads from disk; nothing is cached."""
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
        """The encoder configuration of each dataset, by fingerprint."""
        return {fingerprint: dataset.encoder_config for fingerprint, dataset in self.activations.items()}

    def final_layer(self, encoder: str | None = None) -> LayerKey:
        """The final layer of an encoder with mean pooling: a text embedding, but before the final norm.

        `encoder` is a fingerprint; None: the first encoder. Raises InputError if the activations do not have the layer.
        """
        fingerprint = next(iter(self.activations)) if encoder is None else encoder
        dataset = self.activations[fingerprint]
        key = LayerKey(fingerprint, "mean", dataset.encoder.n_layers)
        if key not in self.layer_keys:
            raise InputError(
                f"activations: the baselines need {key.column!r}, the dataset has {', '.join(dataset.columns)}; "
                "run prefill with the final layer and pooling mean"
            )
        return key


def join(outcomes: Outcomes, activations: Sequence[Activations]) -> Signals:
    """Joins outcomes and activations.

    Raises InputError for a query without a row, a different prompt, two datasets of one encoder, or no query left.
    """
    datasets = {dataset.fingerprint: dataset for dataset in activations}
    if len(datasets) < len(activations):
        raise InputError("activations: got two datasets of the same encoder; give one dataset per encoder")
    failed = {query_id for dataset in activations for query_id in dataset.errors().column("query_id").to_pylist()}
    keep = np.flatnonzero([query_id not in failed for query_id in outcomes.query_ids])
    if not len(keep):
        raise InputError("activations: no query of the outcomes has states; see the column 'error' of the dataset")
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
