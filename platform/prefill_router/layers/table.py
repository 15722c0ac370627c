"""The layer table (layers.parquet), and the agreement of Fisher's J with probe AUC (paper section 7).

In: the scores of the layer search. Out: an Arrow table with a row per layer key, target and k; the rank correlation of
J with AUC, and the AUC lost by choosing layers by J.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from prefill_router.layers.peaks import UNKNOWN, known, rank_correlation
from prefill_router.signals.layer_key import LayerKey
from prefill_router.signals.search import FISHER_COMPONENTS, LayerScores
from prefill_router.signals.selection import ProbeScores


def layer_table(found: Mapping[LayerKey, LayerScores], models: Sequence[str]) -> pa.Table:
    """One row per layer key, target and number of components k. The geometry is repeated for every target and k.

    `fisher_j` is J on FISHER_COMPONENTS components, which compares layers; `fisher_j_at_components` is J at k.
    """
    return pa.Table.from_pylist(
        [
            {
                "encoder": key.encoder,
                "pooling": key.pooling,
                "layer": key.layer,
                "target": model,
                "components": k,
                "auc": known(scores.auc[at, index]),
                "fisher_j": known(scores.fisher_at(FISHER_COMPONENTS)[index]),
                "fisher_j_at_components": known(scores.fisher_at(k)[index]),
                **{name: known(value) for name, value in asdict(scores.geometry or UNKNOWN).items()},
            }
            for key, scores in found.items()
            for index, model in enumerate(models)
            for at, k in enumerate(scores.ks)
        ]
    )


def agreement(scores: Mapping[LayerKey, ProbeScores]) -> dict[str, float | None]:
    """Agreement of J with AUC over the layer keys (their number is `blocks`).

    `rank_correlation` is that of the means over targets, `rank_correlation_per_target` the mean of each target's rank
    correlation; both are None if J or AUC is constant. `auc_lost` is the AUC of the best layer key minus that of J's
    choice, mean over targets.
    """
    auc = np.stack([score.auc for score in scores.values()])
    fisher = np.stack([score.fisher for score in scores.values()])
    own = [rank_correlation(fisher[:, model], auc[:, model]) for model in range(auc.shape[1])]
    defined = [value for value in own if value is not None]
    chosen = fisher.argmax(axis=0)
    return {
        "rank_correlation": rank_correlation(fisher.mean(axis=1), auc.mean(axis=1)),
        "rank_correlation_per_target": float(np.mean(defined)) if defined else None,
        "auc_lost": float((auc.max(axis=0) - auc[chosen, np.arange(auc.shape[1])]).mean()),
        "blocks": len(scores),
    }
